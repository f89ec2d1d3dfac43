"""Names the keys whose values are paths, or names of weights, and says what place each value means."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.config.data import BUILT_IN
from gpt.files import hub_names, paths

LISTS = ("compare",)  # of several places
WEIGHTS = ("init.from", "checkpoint", *LISTS)  # what these name may also be on the hub
LATEST = "latest"  # as `checkpoint`: the newest run; a folder of that name is ./latest
TOKENIZER = "data.tokenizer"  # whose value may also be the name of one that is built in
PATHS = (
    "data.path", "data.prepared_dir", TOKENIZER, "out_dir", "prompts", "export", "output", "file",
    "evaluate.tasks.folder",
    *WEIGHTS,
)  # fmt: skip


def absolute(key: str, value: str, start: Path = paths.PROJECT_ROOT) -> str:
    """The place that the value of one of PATHS means, relative to `start`; names of the hub and LATEST stay."""
    if (key == "checkpoint" and value == LATEST) or (key == TOKENIZER and value in BUILT_IN):
        return value
    is_of_hub = key in WEIGHTS and hub_names.is_repository(value, start, paths.PROJECT_ROOT)
    return value if is_of_hub else str(paths.absolute(value, start))


def stored(key: str, value: str) -> str:
    """The value of one of PATHS as files record it and jobs are known by it, see gpt/files/paths.py."""
    if key in WEIGHTS and hub_names.is_repository(value, paths.PROJECT_ROOT):
        return value
    if key == TOKENIZER and value in BUILT_IN:
        return value
    path = paths.stored(value)
    return f"./{path}" if key in WEIGHTS and path in hub_names.PINNED else path  # a folder that is called gpt2


def with_paths(values: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Replaces in place what nested `values` have under the keys in PATHS by `change(key, path)`; returns `values`. A
    text with an interpolation stays."""
    for key in PATHS:
        *sections, last = key.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        value = section.get(last) if isinstance(section, dict) else None
        if isinstance(value, list) and key in LISTS:
            section[last] = [_changed(key, item, change) for item in value]
        elif value:
            section[last] = _changed(key, value, change)
    return values


def _changed(key: str, value: Any, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str) and value and "${" not in value and "\0" not in value:
        with suppress(UnicodeEncodeError):  # of what can name no file
            return change(key, value)
    return value
