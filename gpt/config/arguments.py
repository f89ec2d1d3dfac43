"""Rewrites the command line for Hydra, which by itself refuses sentences and stops at the first misspelt key."""

import re
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

from gpt.config.value_errors import as_typed, first_sentence, holder, leaf_keys, valid_keys
from gpt.errors import UserError
from gpt.files.paths import PROJECT_ROOT

# Keys of sentences and paths: their values are taken as typed, because Hydra's grammar would change many sentences.
DATA_KEYS = ("data.delimiter", "data.document_separator")
TEXT_KEYS = {"generate": ("checkpoint", "prompt", "prompts", "input", "export"), "train": DATA_KEYS,
             "prepare_data": DATA_KEYS}  # fmt: skip
QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", re.DOTALL)


def prepare(typed: list[str], script: str, kind: type) -> list[str]:
    """The arguments that Hydra gets. `kind` is the dataclass that the configuration becomes.

    Raises UserError or HydraException for what is no override."""
    arguments = [quote_text(argument, TEXT_KEYS.get(script, ())) for argument in typed]
    if script == "train":
        arguments = [*choices_for_weights(arguments), *arguments]
    # Hydra's parser refuses overrides on both sides of a flag: `train.py model=mini -m seed=1,2`
    arguments.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    return force_unknown_keys(arguments, kind)


def choices_for_weights(arguments: list[str]) -> list[str]:
    """The overrides that init.from implies unless others are typed: the architecture of the weights, a low rate."""
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    if given.get("init.from", "null") == "null" or "experiments" in given:
        return []
    return [f"{key}={choice}" for key, choice in (("model", "pretrained"), ("finetune", "full")) if key not in given]


def quote_text(argument: str, keys: tuple[str, ...]) -> str:
    """`prompt=Hello, I am` -> `prompt='Hello, I am'` for the given keys: to Hydra a comma starts a sweep, parentheses
    call a function, an apostrophe opens a string and ${ an interpolation. What is quoted already, or null, stays."""
    key, equals, value = argument.partition("=")
    if key not in keys or not equals or value == "null" or QUOTED.fullmatch(value):
        return argument
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # a backslash before ${ keeps it a text
    return f"{key}={QuotedString(literal, Quote.single).with_quotes()}"


def force_unknown_keys(arguments: list[str], kind: type) -> list[str]:
    """`optimzer.lr=1` -> `++optimzer.lr=1`: `++` makes Hydra accept unknown keys, so that
    gpt/config/value_errors.py reports all of them together with the wrong values."""
    args = get_args_parser().parse_known_args(arguments)[0]
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion or args.experimental_rerun
    if shows or any("hydra.searchpath=" in text for text in args.overrides):  # its groups are not known here
        return arguments
    folders = [PROJECT_ROOT / "conf", PROJECT_ROOT, *map(Path, filter(None, (args.config_path, args.config_dir)))]
    keys = valid_keys(kind)
    forced = {text for text in args.overrides if _has_unknown_key(_parse(text), keys, folders)}
    return [f"++{argument}" if argument in forced else argument for argument in arguments]


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise
    except Exception as error:  # for numbers and nesting beyond what Python takes
        raise UserError(f"{as_typed(text)}: {as_typed(first_sentence(error))}") from error
    if not override.key_or_group:
        raise UserError(f"{text}: there is no key before the =")
    return override


def _has_unknown_key(override: Override, keys: list[str], folders: list[Path]) -> bool:
    key, value = override.key_or_group, override.value()
    is_left_to_hydra = override.type != OverrideType.CHANGE or override.package or not key or "/" in key
    if is_left_to_hydra or key.split(".")[0] == "hydra":
        return False
    if not isinstance(value, dict) and any((folder / key).is_dir() for folder in folders):
        return False  # chooses a file of a group
    return any(full not in keys and holder(full, keys) is None for full in leaf_keys(key, value))
