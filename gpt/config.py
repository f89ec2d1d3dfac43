"""The way from a command line to typed values: Hydra's composition in, one of gpt/schema.py's dataclasses out.

All that is wrong with a command line is reported together, in one line, with exit code 2, before torch is imported.
"""

import dataclasses
import difflib
import gc
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from gpt import console, schema, sweep
from gpt.errors import ENVIRONMENT, USAGE, UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
# Two starts in the same second must not share a directory.
LAUNCH_ID = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"
# Sentences and paths: their values are taken as typed, because half of all sentences mean something else to Hydra.
TEXT_KEYS = {"generate": ("checkpoint", "prompt", "prompts", "input")}
QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", re.DOTALL)
SCHEMAS = {"train": schema.TrainConfig, "generate": schema.GenerateConfig, "prepare_data": schema.PrepareConfig}

T = TypeVar("T")


def absolute(path: str) -> Path:
    """Paths in a configuration are relative to the project, never to where a script was started."""
    return PROJECT_ROOT / Path(path).expanduser()


OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
OmegaConf.register_new_resolver("absolute", lambda path: str(absolute(path)), replace=True)
OmegaConf.register_new_resolver("launch_id", lambda: LAUNCH_ID, replace=True)
OmegaConf.register_new_resolver("sweep_name", lambda name: name or LAUNCH_ID, replace=True)


def load(cfg: DictConfig, kind: type[T]) -> T:
    """A composed configuration as a dataclass. Raises UserError with every problem: unknown, missing, mistyped, out
    of range, or at odds with another value."""
    if kind is schema.TrainConfig:
        cfg = in_its_directory(cfg)
    problems = find_problems(cfg, kind)
    if problems:
        raise UserError("; ".join(problems), remedy="all keys and groups: --help and --cfg job")
    return to_dataclass(cfg, kind)


def to_dataclass(cfg: DictConfig, kind: type[T]) -> T:
    """The one step from Hydra's world into ours: after it there is no DictConfig."""
    return TypeAdapter(kind).validate_python(OmegaConf.to_container(cfg, resolve=True))


def in_its_directory(cfg: DictConfig) -> DictConfig:
    """The configuration of a run, with the directory that Hydra gave it and the sweep that it is a job of."""
    hydra = HydraConfig.get()
    is_job = hydra.mode == RunMode.MULTIRUN
    if is_job and any(override.startswith("out_dir=") for override in hydra.overrides.task):
        raise UserError("out_dir is one directory, and each job of a sweep needs its own", remedy="use sweep.name=...")
    if not os.access(hydra.runtime.output_dir, os.W_OK):  # now, and not after the model has been built
        raise UserError("cannot write to the run directory", hydra.runtime.output_dir, "set out_dir=...", ENVIRONMENT)
    found = {"out_dir": hydra.runtime.output_dir}
    if is_job:
        found["sweep"] = {"name": cfg.sweep.name or re.sub(r"[^\w.-]", "_", Path(hydra.sweep.dir).name)}
    return OmegaConf.merge(cfg, found)


def save(cfg: Any, path: Path) -> None:
    """Writes a configuration for people to read."""
    path.write_text(yaml.safe_dump(schema.as_dict(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8")


def find_problems(cfg: DictConfig, kind: type) -> list[str]:
    """One phrase for each thing that is wrong with `cfg`, each naming its full key."""
    problems, bad = [f"missing key {key}" for key in sorted(OmegaConf.missing_keys(cfg))], []
    try:
        to_dataclass(cfg, kind)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        return [str(error).splitlines()[0]]
    except ValidationError as error:
        for item in error.errors():
            # pydantic puts the name of a union's member into the path: ("optimizer", "adamw", "lr")
            path = [str(part) for i, part in enumerate(item["loc"]) if not (i == 1 and _is_member(item["loc"]))]
            bad.append(".".join(path))
            problems.append(_describe(path, item, kind))
    values = OmegaConf.to_container(cfg, resolve=True)
    for keys, holds, message in CHECKS:
        found = [_get(values, key) for key in keys]
        alone_bad = any(k.startswith(key) or key.startswith(k + ".") for key in keys for k in bad)
        if None not in found and not alone_bad and not holds(*found):
            problems.append(message.format(*found))
    return problems


# Values that are fine alone and wrong together; {0}, {1} are the values in the order of the keys.
CHECKS: list[tuple[tuple[str, ...], Callable[..., bool], str]] = [
    (("model.n_embd", "model.n_head"), lambda d, h: d % h == 0,
     "model.n_embd {0} is not divisible by model.n_head {1}"),
    (("train.tokens_per_step", "model.context_length"), lambda tokens, context: tokens >= context,
     "train.tokens_per_step {0} is less than one row of model.context_length {1}"),
    (("schedule.warmup", "train.max_steps"), lambda warmup, steps: warmup <= steps,
     "schedule.warmup {0} > train.max_steps {1}"),
    (("schedule.decay", "train.max_steps"), lambda decay, steps: decay <= steps,
     "schedule.decay {0} > train.max_steps {1}"),
    (("data.val_fraction", "data.test_fraction"), lambda val, test: val > 0 and val + test < 1,
     "data.val_fraction {0} and data.test_fraction {1}: the first must be above 0, their sum below 1"),
]  # fmt: skip


def launch(main: Callable[[], Any], script: str) -> None:
    """Runs a `@hydra.main` function and leaves the process with the documented exit code.

    An error that a person can mend is one line on stderr; anything else is a bug, whose traceback goes to a file.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra shall raise what goes wrong, not print it and exit with 1
    gc.set_threshold(200_000)  # by default imports alone cause hundreds of collections: most of a second at the start
    JobReturn.return_value = property(_result_or_raise, JobReturn.return_value.fset)
    console.survive_closed_output()
    console.setup()
    arguments = [quote_text(argument, TEXT_KEYS.get(script, ())) for argument in sys.argv[1:]]
    # Hydra's parser refuses overrides on both sides of a flag: `train.py model=mini -m seed=1,2`
    sys.argv[1:] = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    code = 0
    try:
        main()
    except UserError as error:
        code = error.code
        console.error(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        code = USAGE
        console.error(explain(script, error))
    except OSError as error:  # while a directory or a file of the run is made
        code = ENVIRONMENT
        console.error(f"{error.strerror} ({error.filename}); choose another out_dir, or make room there")
    except KeyboardInterrupt:
        code = 130
        console.error("interrupted")
    except Exception as error:
        code = 1
        log_file = console.save_traceback(error, absolute("outputs") / "errors" / f"{LAUNCH_ID}.txt")
        console.error(f"{type(error).__name__}: {error} (this is a bug; the traceback is in {log_file})")
    if sweep.running() and code != USAGE:  # after a bad command line there are no jobs to list
        failed = sweep.close()
        code = code or failed
    console.flush_and_exit(code)


def _result_or_raise(job: JobReturn) -> Any:
    """What Hydra's own getter does, without its line on stderr, which would be a second one for the same error."""
    if job.status == JobStatus.FAILED:
        raise job._return_value
    return job._return_value


def quote_text(argument: str, keys: tuple[str, ...]) -> str:
    """`prompt=Hello, I am` -> `prompt='Hello, I am'` for the given keys: to Hydra a comma starts a sweep, parentheses
    call a function, an apostrophe opens a string and ${ an interpolation. What is quoted already, or null, stays."""
    key, equals, value = argument.partition("=")
    if key not in keys or not equals or value == "null" or QUOTED.fullmatch(value):
        return argument
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # a backslash before ${ keeps it a text
    return f"{key}={QuotedString(literal, Quote.single).with_quotes()}"


def explain(script: str, error: Exception) -> str:
    """What is wrong with this process's command line, in one line. Hydra itself stops at the first unknown key."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    message = " ".join(dict.fromkeys(line for line in lines if line)).partition(" Config search path:")[0]
    if isinstance(error, OverrideParseException):
        message = f"{error.override}: {message}"
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        forced = [_force(override) for override in OverridesParser.create().parse_overrides(overrides)]
        with initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
            cfg = compose(script, overrides=forced)
    except (HydraException, OmegaConfBaseException):
        return message  # a choice that does not exist, or no override at all: Hydra's own words are clear
    if "out_dir" in cfg:
        cfg.out_dir, cfg.overrides = "-", []  # need a running job
    return "; ".join(find_problems(cfg, SCHEMAS[script])) or message


def _force(override: Any) -> str:
    """An override as text that Hydra accepts whether or not its key exists; of an axis of a sweep, the first value."""
    is_group = (PROJECT_ROOT / "conf" / override.key_or_group).is_dir() or override.key_or_group == "experiments"
    if override.is_sweep_override():
        value = next(iter(override.sweep_string_iterator()))
        return f"{override.key_or_group}={value}" if is_group else f"++{override.key_or_group}={value}"
    plain = override.key_or_group.startswith("hydra") or is_group or not override.input_line[0].isalnum()
    return override.input_line if plain else f"++{override.input_line}"


def _is_member(loc: tuple[Any, ...]) -> bool:
    return loc[0] == "optimizer" and len(loc) > 1 and loc[1] in ("adamw", "muon", "sgd")


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _describe(path: list[str], item: Any, kind: type) -> str:
    key, value = ".".join(path), item["input"]
    if item["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(key, _all_keys(kind), n=1)
        return f"unknown key {key}" + (f", did you mean {close[0]}?" if close else "")
    if item["type"] == "missing":
        return f"missing key {key}"
    if item["type"].startswith("union_tag"):
        return f"{key}.name: {item['msg']}"
    return f"{key}={value}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    """Every full key that a schema knows, sections included."""
    keys = []
    for field in dataclasses.fields(kind):
        keys.append(prefix + field.name)
        for member in (field.type, *get_args(field.type), *(a for t in get_args(field.type) for a in get_args(t))):
            if dataclasses.is_dataclass(member):
                keys += _all_keys(member, f"{prefix}{field.name}.")
    return keys
