"""A sweep's YAML files as they were when it began: whoever edits one meanwhile changes no job that waits.

Hydra reads the files again for each job, in the process in which it runs. What a loader has read once it keeps, from
`freeze` on, and takes with it into the processes of a launcher.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader

_files: dict[tuple[str, str], Any] | None = None  # what the loader that composes now has found


def install() -> None:
    """From now on the loaders of this process that are frozen use what they have read."""
    if not hasattr(ConfigRepository.load_config, "__wrapped__"):
        ConfigLoaderImpl.load_configuration = _naming_files(ConfigLoaderImpl.load_configuration)
        for name in ("load_config", "config_exists", "group_exists"):
            setattr(ConfigRepository, name, _remembering(getattr(ConfigRepository, name)))


def freeze(loader: ConfigLoader) -> None:
    """From now on `loader` reads no file a second time."""
    loader.files = {}


def _naming_files(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> Any:
        global _files
        _files = vars(self).get("files")
        try:
            return load(self, *args, **kwargs)
        finally:
            _files = None

    return load_configuration


def _remembering(look: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look)
    def remembered(self: ConfigRepository, config_path: str) -> Any:
        if _files is None:
            return look(self, config_path)
        key = look.__name__, config_path
        if key not in _files:
            _files[key] = look(self, config_path)
        return copy.deepcopy(_files[key])  # composing changes it

    return remembered
