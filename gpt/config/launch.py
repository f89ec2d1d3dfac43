"""The way from a command line to typed values: Hydra's composition in, one of gpt/config/schema.py's dataclasses out.

All that is wrong with a command line is reported together, in one line, with exit code 2, before torch is imported.
"""

import gc
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from gpt.config import guard, schema
from gpt.config.override_errors import find_faults
from gpt.config.value_errors import find_problems
from gpt.errors import ENVIRONMENT, USAGE, UserError
from gpt.files.paths import LAUNCH_ID, PROJECT_ROOT, absolute
from gpt.runs import interrupt
from gpt.sweeps import callback, composition, dry_run, frozen_files, jobs, plugins
from gpt.terminal import console
from gpt.weights import locate

# Sentences and paths: their values are taken as typed, because half of all sentences mean something else to Hydra.
TEXT_KEYS = {"generate": ("checkpoint", "prompt", "prompts", "input", "export")}
QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", re.DOTALL)
SCHEMAS = {"train": schema.TrainConfig, "generate": schema.GenerateConfig, "prepare_data": schema.PrepareConfig}
REMEDY = "all keys and groups: --help and --cfg job"

T = TypeVar("T")


guard.install()
plugins.install()
frozen_files.install()
OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
OmegaConf.register_new_resolver("absolute", lambda path: str(absolute(path)), replace=True)
OmegaConf.register_new_resolver("launch_id", lambda: LAUNCH_ID, replace=True)
OmegaConf.register_new_resolver("job_id", lambda _root_: jobs.name_of(composition.identity(_root_)), replace=True)
OmegaConf.register_new_resolver(
    "architecture",
    lambda key, _root_: locate.setting(_root_.init["from"], _root_.init.revision, PROJECT_ROOT, key),
    replace=True,
)  # conf/model/pretrained.yaml
OmegaConf.register_new_resolver("sweep_name", lambda name: name or LAUNCH_ID, replace=True)


def load(cfg: DictConfig, kind: type[T]) -> T:
    """A composed configuration as a dataclass. Raises UserError with every problem: unknown, missing, mistyped, out
    of range, or at odds with another value."""
    return typed(in_its_directory(cfg) if kind is schema.TrainConfig else cfg, kind)


def typed(cfg: DictConfig, kind: type[T]) -> T:
    """The same, wherever the run would be."""
    problems = find_problems(cfg, kind)
    if problems:
        raise UserError("; ".join(problems), remedy=REMEDY)
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
    output_dir = Path(hydra.runtime.output_dir)
    there = next(path for path in [output_dir, *output_dir.parents] if path.exists())  # a dry run does not make it
    if not os.access(there, os.W_OK):  # now, and not after the model has been built
        raise UserError("cannot write to the run directory", hydra.runtime.output_dir, "set out_dir=...", ENVIRONMENT)
    found = {"out_dir": hydra.runtime.output_dir}
    if is_job:
        found["sweep"] = {"name": cfg.sweep.name or re.sub(r"[^\w.-]", "_", Path(hydra.sweep.dir).name)}
    return OmegaConf.merge(cfg, found)


def save(cfg: Any, path: Path) -> None:
    """Writes a configuration for people to read."""
    path.write_text(yaml.safe_dump(schema.as_dict(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8")


def launch(main: Callable[[], Any], script: str) -> None:
    """Runs a `@hydra.main` function and leaves the process with the documented exit code.

    An error that a person can mend is one line on stderr; anything else is a bug, whose traceback goes to a file.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra shall raise what goes wrong, not print it and exit with 1
    gc.set_threshold(400_000)  # a start makes 300,000 objects, to stay: searching them hundreds of times is for nothing
    JobReturn.return_value = property(_result_or_raise, JobReturn.return_value.fset)
    interrupt.end_at_once()
    console.survive_closed_output()
    console.setup()
    arguments = [quote_text(argument, TEXT_KEYS.get(script, ())) for argument in sys.argv[1:]]
    # Hydra's parser refuses overrides on both sides of a flag: `train.py model=mini -m seed=1,2`
    arguments[:0] = implied(arguments) if script == "train" else []
    sys.argv[1:] = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    code = 0
    try:
        try:
            main()
        except callback.DryRun as asked:
            code = dry_run.run(main, asked)
        except callback.Report as asked:
            from gpt.sweeps import summary

            name = typed(composition.without_hydra(asked.config), SCHEMAS[script]).sweep.report
            code = summary.close(Path(asked.config.hydra.sweep.dir).parent / name)
    except UserError as error:
        code = error.code
        console.error(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        code, message = explain(script, error)
        console.error(message)
    except KeyboardInterrupt as error:
        code = getattr(error, "code", 130)
        console.error(str(error) or "interrupted")
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # while a directory or a file of the run is made
            code = ENVIRONMENT
            console.error(f"{error.strerror} ({error.filename}); choose another out_dir, or make room there")
        else:
            code = 1
            log_file = console.save_traceback(error, absolute("outputs") / "errors" / f"{LAUNCH_ID}.txt")
            console.error(f"{type(error).__name__}: {error} (this is a bug; the traceback is in {log_file})")
    if callback.running():
        failed = callback.close(hurry=code >= 128)
        code = code or failed
    console.flush_and_exit(code)


def implied(arguments: list[str]) -> list[str]:
    """Weights from elsewhere bring their architecture, and are trained gently, unless something else is asked for."""
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    if given.get("init.from", "null") == "null" or "experiments" in given:
        return []
    return [f"{key}={choice}" for key, choice in (("model", "pretrained"), ("finetune", "full")) if key not in given]


def resume_command(cfg: schema.TrainConfig) -> str:
    """What to type to go on with a run, also with one job of a sweep."""
    kept = [override for override in cfg.overrides if not override.startswith("out_dir=")]
    mode = ["hydra.mode=RUN"] if cfg.sweep.name else []  # an experiment would start its sweep again
    out_dir = quote_text(f"out_dir={cfg.out_dir}", ("out_dir",) if re.search(r"[^\w./-]", cfg.out_dir) else ())
    return shlex.join(["python", str(PROJECT_ROOT / "train.py"), *kept, *mode, out_dir])


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


def explain(script: str, error: Exception) -> tuple[int, str]:
    """Exit code and, in one line, what is wrong with this process's command line; `error` is what Hydra says of it."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    message = " ".join(dict.fromkeys(line for line in lines if line)).partition(" Config search path:")[0]
    try:
        faults = find_faults(PROJECT_ROOT, script, SCHEMAS[script])
    except UserError as unreadable:
        return unreadable.code, str(unreadable)
    return USAGE, "; ".join([*(faults or [message]), REMEDY])
