"""Replaces functions of Hydra that sweeps need otherwise; tests/sweeps/test_hydra_patches.py names each of them.

Replaced: Plugins.instantiate_launcher, Plugins.is_in_toplevel_plugins_module, JobReturn.return_value and
ConfigLoaderImpl._apply_overrides_to_config. Besides, the loader of a sweep gets another repository of YAML files, and
what plugins register under the name of a file of conf/ is removed.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from gpt.files.paths import PROJECT_ROOT
from gpt.sweeps import workers
from gpt.sweeps.ray_cluster import RayLauncher
from gpt.sweeps.torchrun import TorchrunLauncher

Wrap = Callable[[Launcher, Callable[..., Any]], Launcher]

HYDRAS_INSTANTIATE_LAUNCHER = Plugins.instantiate_launcher
HYDRAS_IS_PLUGIN = Plugins.is_in_toplevel_plugins_module
HYDRAS_APPLY_OVERRIDES = ConfigLoaderImpl._apply_overrides_to_config
LAUNCHERS = {f"{launcher.__module__}.{launcher.__name__}": launcher for launcher in (TorchrunLauncher, RayLauncher)}
_wrap: Wrap | None = None
_takes_unknown_keys = False


def install() -> None:
    """Makes the changes, in each process that composes a job. Once is as good as twice."""
    Plugins.instantiate_launcher = _instantiate_launcher
    Plugins.is_in_toplevel_plugins_module = staticmethod(_is_plugin)
    for launcher in LAUNCHERS.values():
        Plugins.instance().register(launcher)
    JobReturn.return_value = property(_value_or_raise, JobReturn.return_value.fset)
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(_apply_overrides)
    _prefer_files_of_conf()


def take_unknown_keys(flag: bool) -> None:
    """Makes Hydra take keys that a configuration does not have, as with `++`, instead of stopping at the first one: so
    gpt/config/value_errors.py reports all of them, together with the wrong values."""
    global _takes_unknown_keys
    _takes_unknown_keys = flag


def wrap_launcher(wrap: Wrap) -> None:
    """Makes the next launcher the one that `wrap` returns for Hydra's launcher and the function that runs a job.

    Hydra starts all jobs of a sweep each time. Which of them a launcher gets, only the launcher itself can decide, and
    Hydra takes launchers from installed packages only, one at a time."""
    global _wrap
    _wrap = wrap


def freeze(loader: ConfigLoader) -> None:
    """Makes `loader` read no YAML file a second time: whoever edits one meanwhile changes no job that waits.

    Hydra reads the files again for each job, in the process in which it runs. The loader takes what it has read with it
    into the processes of a launcher."""
    loader.repository = FrozenRepository(loader.config_search_path)


class FrozenRepository(ConfigRepository):
    """Remembers each answer about the files of a search path."""

    def __init__(self, *arguments: Any) -> None:
        self._answers: dict[tuple[str, str], Any] = {}
        super().__init__(*arguments)

    def __deepcopy__(self, memo: Any) -> "FrozenRepository":
        """Hydra composes each job with a copy, whose search path it may change: the answers are shared."""
        return copy.copy(self)

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(self._remembered("load_config", config_path))  # composing changes it

    def config_exists(self, config_path: str) -> bool:
        return self._remembered("config_exists", config_path)

    def group_exists(self, config_path: str) -> bool:
        return self._remembered("group_exists", config_path)

    def get_schema_source(self) -> ConfigSource:
        _prefer_files_of_conf()  # again, because plugins register anew in each process that a launcher starts
        return super().get_schema_source()

    def _remembered(self, method: str, config_path: str) -> Any:
        if (method, config_path) not in self._answers:
            self._answers[method, config_path] = getattr(super(), method)(config_path)
        return self._answers[method, config_path]


def _apply_overrides(overrides: list[Override], cfg: DictConfig) -> None:
    HYDRAS_APPLY_OVERRIDES([_forced(override) if _takes_unknown_keys else override for override in overrides], cfg)


def _forced(override: Override) -> Override:
    """`optimzer.lr=1` as `++optimzer.lr=1`, also a key that only another choice of its group has; not Hydra's own keys,
    nor groups. The record of what was typed is made of the original."""
    key = override.key_or_group
    is_left_to_hydra = "/" in key or override.package is not None or key.partition(".")[0] == "hydra"
    if is_left_to_hydra or override.type != OverrideType.CHANGE:
        return override
    return replace(override, type=OverrideType.FORCE_ADD)


def _instantiate_launcher(self: Plugins, *, task_function: Callable[..., Any], **others: Any) -> Launcher:
    global _wrap
    wrap, _wrap = _wrap, None
    if wrap is None:
        return HYDRAS_INSTANTIATE_LAUNCHER(self, task_function=task_function, **others)
    alone = functools.partial(workers.run_isolated, task_function)
    return wrap(HYDRAS_INSTANTIATE_LAUNCHER(self, task_function=alone, **others), task_function)


def _is_plugin(name: str) -> bool:
    """Hydra takes plugins from packages below `hydra_plugins` alone; this project's launchers are no such package."""
    return name in LAUNCHERS or HYDRAS_IS_PLUGIN(name)


def _value_or_raise(job: JobReturn) -> Any:
    """Does what Hydra's getter does, without its line on stderr, which would be a second one for the same error."""
    if job.status == JobStatus.FAILED:
        raise job._return_value
    return job._return_value


def _prefer_files_of_conf() -> None:
    """Hydra would merge a file of conf/ with what a plugin registers under the same name, and warn of it."""
    Plugins.instance()  # in which plugins register
    store, root = ConfigStore.instance().repo, PROJECT_ROOT / "conf"
    for file in root.glob("hydra/*/**/*.yaml"):
        group = store
        for part in file.relative_to(root).parts[:-1]:
            group = group.get(part, {})
        group.pop(file.name, None)
