"""Takes the settings of a run from its config.yaml, so that out_dir alone is enough to go on with it.

The file may be another person's, and is data: only values of known settings are read, and no interpolation. A value
that came through ${oc.env:...} is stored unresolved there, and has to be typed again.
"""

import shlex
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING
from omegaconf._utils import get_yaml_loader

from gpt.config.schema import ADDED, TrainConfig, nested
from gpt.config.value_errors import valid_keys
from gpt.errors import UserError
from gpt.files import directory

FILE = "config.yaml"
LARGEST = 2**20  # bytes; they have about 3,000
GROUP, CHOICE = "run", "settings"  # under which Hydra knows what was read
SECTIONS = ("model", "data", "optimizer", "schedule", "objective", "finetune")  # each chosen as a file of conf/
PARALLEL = "parallel"  # so is this one; a run from before it has none, and goes on with the file that is the default
WHOLE = ("experiments", "debug")  # files that change several sections: with one of them, all is composed anew
# What is of one start and not of the run. A job that is started alone is not halved with the others of its sweep.
OF_A_START = ("out_dir", "resume", "allow_changed", "overrides", "dry_run", "report", "sweep.rungs", "sweep.pause_at")
LIMITS = ("train.max_steps", "train.max_epochs")  # the smaller one counts, and train.max_tokens only without them
ABSENT = object()


def choices(arguments: list[str]) -> list[str]:
    """The overrides that make Hydra begin with the settings of the run in out_dir; none where there is no run. A group
    that is typed, such as model=small, replaces its own section.

    Raises UserError for a config.yaml that is none, and for settings that cannot be taken from it."""
    if not any(text.lstrip("+").startswith("out_dir=") for text in arguments):
        return []
    try:
        parser = OverridesParser.create()
        typed = {o.key_or_group: o for o in map(parser.parse_override, arguments_only(arguments))}
    except Exception:  # whatever is wrong with it, it is parsed again and reported
        return []
    out_dir = typed["out_dir"].value()
    flags = {text.partition("=")[0] for text in arguments if text.startswith("-")}
    if flags & {"-m", "--multirun", "--config-name", "-cn"} or typed.keys() & {*WHOLE, "hydra.mode"}:
        return []
    if not isinstance(out_dir, str) or "${" in out_dir or not is_run(Path(out_dir)):
        return []
    path = Path(out_dir, FILE)
    groups = [name for name in (*SECTIONS, PARALLEL) if name in typed and not isinstance(typed[name].value(), dict)]
    values = read(path)
    settings = {key: value for key, value in known(values).items() if key.split(".")[0] not in groups}
    check(path, settings, [*groups, *typed])
    if any(typed[key].value() is not None for key in (*LIMITS, "train.max_tokens") if key in typed):
        settings = {key: value for key, value in settings.items() if key not in LIMITS}  # else they would hide it
    for key, value in list(settings.items()):  # what is left is typed, or has a value in conf/train.yaml
        if value is ABSENT or has_to_be_typed(key, value):
            del settings[key]
            settings |= {key: MISSING} if key.split(".")[0] in SECTIONS else {}
    settings["overrides"] = typed_so_far(values, arguments_only(arguments))
    ConfigStore.instance().store(group=GROUP, name=CHOICE, node=nested(settings), package="_global_")
    replaced = [name for name in SECTIONS if name not in [*groups, "finetune"]]  # which has no file unless one is typed
    return [f"+{GROUP}={CHOICE}", *(f"~{name}" for name in replaced)]


def arguments_only(arguments: list[str]) -> list[str]:
    """Without flags such as -m."""
    return [text for text in arguments if not text.startswith("-")]


def is_run(out_dir: Path) -> bool:
    """Whether a directory is that of a run that has recorded its settings."""
    try:
        directory.check_owner(out_dir, "run dir", "", directory.RUN)
        return (out_dir / FILE).is_file()
    except (UserError, OSError, ValueError):  # reported when the run begins
        return False


class _Loader(get_yaml_loader()):
    """Reads values as Hydra reads those of conf/: 1e-3 is a number, a date is a text. Makes no object of a class, and
    refuses aliases: a few of them can stand for gigabytes, and no run writes any."""

    yaml_constructors = yaml.SafeLoader.yaml_constructors  # omegaconf's loader adds those of pathlib's classes

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def read(path: Path) -> dict[str, Any]:
    """What the file says, with the values of settings that came after it. Raises UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        values = yaml.load(content.decode("utf-8"), _Loader)
        if len(content) > LARGEST or not isinstance(values, dict):
            raise ValueError
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError("not the settings of a run", str(path), "remove it, and type the run's settings") from error
    for key, value in ADDED.items():
        *sections, name = key.split(".")
        place: Any = values
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.setdefault(name, value)
    return values


def known(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run by full key, in the order of the schema. What this version does not know is left out; what
    the file lacks within a section is ABSENT."""
    keys = [key for key in valid_keys(TrainConfig, values) if key not in OF_A_START]
    found = {}
    for key in keys:
        *sections, name = key.split(".")
        place: Any = values
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        value = place.get(name, ABSENT) if isinstance(place, dict) else None
        is_section = any(other.startswith(f"{key}.") for other in keys) and (value is ABSENT or isinstance(value, dict))
        if isinstance(place, dict) and not is_section:
            found[key] = value
    return found


def check(path: Path, settings: dict[str, Any], typed: list[str]) -> None:
    """Raises UserError naming the settings that are not typed and cannot be taken from the file."""
    left = {
        key: value for key, value in settings.items() if not any(key == t or key.startswith(f"{t}.") for t in typed)
    }
    missing = [key for key, value in left.items() if value is ABSENT and key.split(".")[0] in SECTIONS]
    texts = {key: value for key, value in left.items() if is_interpolated(value)}
    if missing:
        what = f"the settings of the run lack {', '.join(missing)}, being of an older version"
        raise UserError(what, str(path), f"type them, as in {missing[0]}=...")
    if texts:
        what = f"{', '.join(texts)}: what is read from the environment has to be typed again"
        raise UserError(what, str(path), " ".join(shlex.quote(f"{key}={text}") for key, text in texts.items()))


def is_interpolated(value: Any) -> bool:
    """Whether it has a ${...}, which is resolved where its user has typed it, and not where a file says so."""
    return "${" in str(value) if isinstance(value, str | list | dict) else False


def has_to_be_typed(key: str, value: Any) -> bool:
    """Whether a setting is not taken from a file. It may switch W&B off, and not on where its user has it off."""
    return is_interpolated(value) or (key == "wandb.mode" and value == "online")


def typed_so_far(values: dict[str, Any], arguments: list[str]) -> list[str]:
    """What was typed for the run, at its first start and now, for the record."""
    before = values.get("overrides")
    texts = [text for text in before if isinstance(text, str)] if isinstance(before, list) else []
    by_key = {text.partition("=")[0].lstrip("+~"): text for text in [*texts, *arguments] if "${" not in text}
    return [text for key, text in by_key.items() if key.split(".")[0] not in ("hydra", "out_dir")]
