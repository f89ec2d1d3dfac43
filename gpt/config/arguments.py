"""Rewrites the command line for Hydra, which by itself refuses sentences and takes paths as its grammar has them."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError

from gpt.config import places, run_settings
from gpt.config.value_errors import as_typed, first_sentence
from gpt.errors import UserError
from gpt.files.paths import exists

# Keys of sentences and names, and of paths: their values are taken as typed, because Hydra's grammar would change or
# refuse many of them. Paths are relative to where the user is.
SENTENCES = ("prompt", "input")
SEVERAL = ("stop",)  # sentences in a list
NAMES = (
    "wandb.project", "wandb.entity", "wandb.group", "sweep.name", "report", "data.name", "data.hub", "model.name",
    "init.revision", "data.delimiter", "data.document_separator",
)  # fmt: skip
NAMES_BELOW = ("data.card.", "data.columns.")
PATHS = (*places.PATHS, "hydra.run.dir", "hydra.sweep.dir")
INPUTS = ("data.path", "prompts", "file", *places.WEIGHTS)  # which exist already
QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", re.DOTALL)


def prepare(typed: list[str], script: str, architecture: Callable[[str, str | None], str]) -> list[str]:
    """The arguments that Hydra gets. `architecture`: the file of conf/model/ for weights, by their name and revision.
    Raises UserError or HydraException for what is no override."""
    may_be_several = any(text in ("-m", "--multirun", "hydra.mode=MULTIRUN") for text in typed)
    arguments = [text for argument in typed for text in taken_as_typed(argument, may_be_several)]
    if script == "train":
        arguments = [*choices_for_weights(arguments, architecture), *arguments]
        arguments = [*run_settings.choices(arguments), *arguments]
    # Hydra's parser refuses overrides on both sides of a flag: `train.py model=mini -m seed=1,2`
    arguments.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    if not only_shows(arguments):
        for text in get_args_parser().parse_known_args(arguments)[0].overrides:
            _parse(text)
    return arguments


def choices_for_weights(arguments: list[str], architecture: Callable[[str, str | None], str]) -> list[str]:
    """The overrides that init.from implies unless others are typed: the architecture of the weights, a low rate. Raises
    UserError for weights of several architectures."""
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    if given.get("init.from", "null") == "null" or "experiments" in given:
        return []
    chosen = [] if "finetune" in given else ["finetune=full"]
    if "model" in given:
        return chosen
    names, revisions = (_values(given, key) for key in ("init.from", "init.revision"))
    files = {architecture(name, revisions[0] if revisions else None) for name in names if not only_shows(arguments)}
    if len(files) > 1:
        what = f"init.from names weights of several architectures, model={' and model='.join(sorted(files))}"
        raise UserError(what, remedy="a sweep for each")
    return [f"model={files.pop() if files else 'pretrained'}", *chosen]


def _values(given: dict[str, str], key: str) -> list[str]:
    """The texts that a key has in some job, without those that only Hydra can find out."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={given.get(key, 'null')}")
    except HydraException:  # reported when all is parsed
        return []
    values = override.value().list if override.is_choice_sweep() else [override.value()]
    texts = [value.text if isinstance(value, QuotedString) else value for value in values]
    return [text for text in texts if isinstance(text, str) and "${" not in text]


def taken_as_typed(argument: str, may_be_several: bool) -> list[str]:
    """`prompt=Hello, I am` -> `prompt='Hello, I am'`, `data.path=a (1).csv` -> `data.path='/home/me/a (1).csv'`:
    to Hydra a comma starts a sweep, parentheses call a function and an apostrophe opens a string. null stays, and what
    is in quotes already loses them, as everywhere in Hydra. Where there `may_be_several`, choice(a,b) makes two jobs,
    and so does a,b of files that exist, unless that is itself one."""
    left, equals, value = argument.partition("=")
    key = left.lstrip("+")
    if not equals or not value or left.startswith("-"):
        return [argument]
    if key in SEVERAL:
        return [f"{left}={_list_of_sentences(key, value)}"]
    if key not in (*SENTENCES, *NAMES, *PATHS) and not key.startswith(NAMES_BELOW):
        return [argument, *_paths_within(argument)]
    if key in places.LISTS or (key == "report" and value != "null"):
        items = value.removeprefix("[").removesuffix("]").split(",")
        return [f"{left}=[{','.join(_literal(key, item.strip()) for item in items)}]"]
    chosen = _choices(key, value) if may_be_several else None
    return [f"{left}={','.join(_literal(key, text) for text in chosen or [value])}"]


def _list_of_sentences(key: str, value: str) -> str:
    """[a,"b, c"] stays where it is a list to Hydra; else, as [###] is, its parts are taken as typed; and so is a single
    sentence, which needs no brackets."""
    if value == "null" or not (value.startswith("[") and value.endswith("]")):
        return value if value == "null" else f"[{_literal(key, value)}]"
    with contextlib.suppress(HydraException):
        OverridesParser.create().parse_override(f"{key}={value}")
        return value
    return f"[{','.join(_literal(key, part) for part in value[1:-1].split(','))}]"


def _choices(key: str, value: str) -> list[str] | None:
    """The values that choice(a,b) or, for files that exist, a,b stands for; None for one value."""
    if value.startswith("choice("):
        try:
            override = OverridesParser.create().parse_override(f"{key}={value}")
        except HydraException:
            return None
        items = override.value().list if override.is_choice_sweep() else []
        return [item.text if isinstance(item, QuotedString) else as_typed(item) for item in items]
    if key in INPUTS and "," in value and not exists(Path(places.absolute(key, value, Path.cwd()))):
        places_of_parts = [places.absolute(key, part, Path.cwd()) for part in value.split(",") if part != "null"]
        if all(not Path(place).is_absolute() or exists(Path(place)) for place in places_of_parts):
            return value.split(",")
    return None


def _literal(key: str, value: str) -> str:
    """One value so that Hydra takes it as it is. Interpolations are for Hydra to resolve, except in sentences."""
    if value == "null":
        return value
    if QUOTED.fullmatch(value):
        if key not in PATHS:
            return value
        value = OverridesParser.create().parse_override(f"{key}={value}")._value.text
    if key in PATHS and not (value.startswith("${") and _has_interpolation(value)):
        value = places.absolute(key, value, Path.cwd())
        if re.fullmatch(r"[\w./-]+", value, re.ASCII):
            return value
    if key in (*SENTENCES, *SEVERAL) or not _has_interpolation(value):
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # a backslash before ${ keeps it a text
    return QuotedString(value, Quote.single).with_quotes()


def _has_interpolation(value: str) -> bool:
    try:
        grammar_parser.parse(value)
    except GrammarParseError:
        return False
    return "${" in value


def _paths_within(argument: str) -> list[str]:
    """`init={from: x.pt}` -> [`init.from=/home/me/x.pt`]"""
    if argument.lstrip("+").partition("=")[0] not in ("init", "data"):
        return []
    override = _parse(argument)
    key, value = override.key_or_group, override.value()
    return [
        f"{full}={_literal(full, str(value[name]))}"
        for name in (value if isinstance(value, dict) else ())
        if (full := f"{key}.{name}") in PATHS and value[name]
    ]


def only_shows(arguments: list[str]) -> bool:
    """Whether Hydra is to show something (--help, --cfg) and to run nothing."""
    args = get_args_parser().parse_known_args(arguments)[0]
    shown = (args.help, args.hydra_help, args.cfg, args.info, args.shell_completion, args.experimental_rerun)
    return any(shown)


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
