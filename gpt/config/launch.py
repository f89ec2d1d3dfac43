"""Takes a script from its command line to typed values, and from its errors to an exit code.

Hydra composes the configuration; the result is a dataclass of gpt/config/schema.py. All faults are reported together,
in one line, with exit code 2, before torch is imported.
"""

import errno
import functools
import gc
import logging
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from gpt.config import arguments, environment, places, run_settings, schema
from gpt.config.families import lora_targets
from gpt.config.value_errors import find_errors, user_error_behind
from gpt.errors import ENVIRONMENT, UserError, exit_code
from gpt.files import atomic
from gpt.files.paths import LAUNCH_ID, PROJECT_ROOT, absolute
from gpt.machine import group_faults, rank_environment, threads
from gpt.runs import interrupt
from gpt.sweeps import callback, composition, dry_run, hydra_patches, job_process, jobs, plugins
from gpt.terminal import console, output
from gpt.weights import locate

SCHEMAS = {  # what a script's configuration becomes, as module:attribute: the last one takes numpy to load
    "train": "gpt.config.schema:TrainConfig",
    "generate": "gpt.config.schema:GenerateConfig",
    "prepare_data": "gpt.config.schema:PrepareConfig",
    "evaluate": "gpt.evaluation.settings:EvaluateConfig",
}
REMEDY = "all keys and groups: --help and --cfg job"
# What Hydra raises for a command line that it refuses, and for a file of a group that is not YAML.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)

# Lines that OmegaConf adds: the same key again, and classes of its own.
OMEGACONFS = ("full_key:", "object_type=", "reference_type=")

T = TypeVar("T")

log = logging.getLogger(__name__)

hydra_patches.install()
setup_globals()  # Hydra's own resolvers, which --experimental-rerun would lack
environment.install()
OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
OmegaConf.register_new_resolver("absolute", lambda path: str(absolute(path)), replace=True)
OmegaConf.register_new_resolver("launch_id", lambda: launch_id(), replace=True)
OmegaConf.register_new_resolver("job_id", lambda _root_: jobs.name_of(composition.identity(_root_)), replace=True)
OmegaConf.register_new_resolver(
    "architecture",
    lambda key, at_most=None, *, _root_: setting(key, at_most, _root_),
    replace=True,
)  # conf/model/pretrained.yaml
OmegaConf.register_new_resolver("choice", lambda group, _root_: choice(group, _root_), replace=True)
OmegaConf.register_new_resolver(
    "of_new_embeddings", lambda factor, _root_: of_new_embeddings(factor, _root_), replace=True
)  # conf/optimizer/adamw.yaml
OmegaConf.register_new_resolver("lora_targets", lora_targets, replace=True)
OmegaConf.register_new_resolver("sweep_name", lambda name: name or LAUNCH_ID, replace=True)


def of_new_embeddings(factor: float, root: DictConfig) -> float | None:
    """`factor` times optimizer.lr; None where the first weights are not random, and for an lr that is no rate, which
    has its own message."""
    try:
        lr = root.optimizer.lr
    except OmegaConfBaseException:
        return None
    is_rate = isinstance(lr, int | float) and 0 < lr < math.inf
    return factor * lr if is_rate and root.init["from"] is None else None


def setting(key: str, at_most: int | None, root: DictConfig) -> Any:
    """A value of the weights that init.from names, or a smaller number."""
    value = locate.setting(root.init["from"], root.init.revision, PROJECT_ROOT, key)
    return value if at_most is None else min(value, at_most)


def architecture(name: str, revision: str | None) -> str:
    """The file of conf/model/ for weights. What is wrong with these is said later, with all else that is wrong."""
    try:
        return locate.choice(name, revision, PROJECT_ROOT)
    except UserError:
        return "pretrained"


@functools.cache
def launch_id() -> str:
    """The name of this start, the same in all ranks of it."""
    place = rank_environment.read()
    if place.count == 1 and not place.has_agent:
        return LAUNCH_ID
    from gpt.machine import process_group  # here, because it takes the seconds that torch takes

    return process_group.launch_id(LAUNCH_ID)


def choice(group: str, root: DictConfig) -> str:
    """The name of the chosen file of a group, "None" where there is none; a folder in it becomes a part of the name."""
    hydra = (
        root.hydra if "hydra" in root else HydraConfig.get()
    )  # the configuration of a job that is planned has its own
    chosen = hydra.runtime.choices.get(group)  # a run that goes on by its folder has chosen none, and may be evaluated
    return str(chosen).removesuffix(".yaml").replace("/", "_")


def schema_of(script: str) -> type:
    """The dataclass that a script's configuration becomes."""
    module, _, name = SCHEMAS[script].partition(":")
    return getattr(import_module(module), name)


def compose(typed: list[str]) -> schema.TrainConfig:
    """The settings of a run with these arguments of train.py, for use from Python: no run directory is made. Raises
    UserError as `load` does, and for what Hydra refuses."""
    try:
        with hydra.initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
            overrides = arguments.prepare(typed, "train", architecture)
            hydra_patches.take_unknown_keys(True)
            cfg = hydra.compose("train", overrides, return_hydra_config=True)
        return validated(composition.without_hydra(cfg), schema.TrainConfig)
    except COMPOSITION_ERRORS as error:
        raise refused(error) from error


def load(cfg: DictConfig, kind: type[T]) -> T:
    """A composed configuration as a dataclass. Raises UserError with every problem: unknown, missing, mistyped, out
    of range, or at odds with another value."""
    return validated(with_run_directory(cfg) if kind is schema.TrainConfig else cfg, kind)


def validated(cfg: DictConfig, kind: type[T]) -> T:
    """As `load`, without the directory of a run."""
    groups = HydraConfig.get().runtime.choices if HydraConfig.initialized() else ()
    errors = find_errors(cfg, kind, groups)
    if errors:
        raise UserError("; ".join(errors), remedy=example() if "missing key checkpoint" in errors else REMEDY)
    return to_dataclass(cfg, kind)


def example() -> str:
    """A command for a person who does not know generate.py yet."""
    from gpt.data import prompt_files  # here, as no other start needs the readers of files and the leaderboard
    from gpt.sweeps import named_runs

    run = "" if named_runs.newest() else "make a run with python train.py, then "
    return f"{run}python generate.py checkpoint=latest {prompt_files.EXAMPLE}; more: --help"


def to_dataclass(cfg: DictConfig, kind: type[T]) -> T:
    """The one step from Hydra's configuration to typed values: after it, no DictConfig, and paths are absolute."""
    values = places.with_paths(OmegaConf.to_container(cfg, resolve=True), places.absolute)
    if kind is schema.TrainConfig:  # which is stored
        values |= {"unresolved": environment.unresolved(cfg)}
    return TypeAdapter(kind).validate_python(values)


def evaluated(train: Callable[[schema.TrainConfig], T], cfg: schema.TrainConfig) -> T:
    """What `train` returns. A run that has come to its end is evaluated as evaluate_at_end says; what goes wrong then
    is a warning, as the run itself is complete."""
    try:
        result = train(cfg)
    except group_faults.GroupFault as fault:
        fault.remedy = fault.remedy or (f"to go on: {resume_command(cfg)}" if fault.where else "")
        raise
    is_finished = not cfg.dry_run and (Path(cfg.out_dir) / "last_model.pt").exists()
    is_finished = is_finished and rank_environment.read().is_first
    for kind in cfg.evaluate_at_end if is_finished else ():
        values = {"checkpoint": cfg.out_dir, "evaluate": f"[{kind}]", "device": cfg.device}
        values |= {"threads": cfg.threads or "null", "wandb.mode": cfg.wandb.mode, "wandb.project": cfg.wandb.project}
        typed = [f"{key}={value}" for key, value in values.items()]
        overrides = [text for argument in typed for text in arguments.taken_as_typed(argument, may_be_several=False)]
        try:
            settings = validated(composition.of_script("evaluate", overrides), schema_of("evaluate"))
            import_module("evaluate").evaluate(settings)
        except UserError as error:
            log.warning(f"evaluate_at_end: {kind}: {error}")
    return result


def with_run_directory(cfg: DictConfig) -> DictConfig:
    """The configuration of a run, with the directory that Hydra gave it and the sweep that it is a job of."""
    hydra = HydraConfig.get()
    is_job = hydra.mode == RunMode.MULTIRUN
    if is_job and any(override.startswith("out_dir=") for override in hydra.overrides.task):
        raise UserError("out_dir is one directory, and each job of a sweep needs its own", remedy="use sweep.name=...")
    output_dir = Path(hydra.runtime.output_dir)
    existing = next(path for path in [output_dir, *output_dir.parents] if path.exists())  # a dry run makes none
    if not os.access(existing, os.W_OK):  # now, and not after the model has been built
        remedy = "choose another sweep.name, or hydra.sweep.dir=..." if is_job else "set out_dir=..."
        raise UserError("cannot write to the run directory", hydra.runtime.output_dir, remedy, ENVIRONMENT)
    changes = {"out_dir": hydra.runtime.output_dir}
    if is_job:
        changes["sweep"] = {"name": cfg.sweep.name or re.sub(r"[^\w.-]", "_", Path(hydra.sweep.dir).name)}
    return OmegaConf.merge(cfg, changes)


def save(cfg: Any, path: Path) -> None:
    """Writes a configuration for people to read."""
    atomic.write(path, yaml.safe_dump(schema.as_dict(cfg), sort_keys=False, allow_unicode=True))


def resume_command(cfg: schema.TrainConfig) -> str:
    """What to type to go on with a run, also with one job of a sweep: its config.yaml has the settings."""
    settings = schema.flatten(schema.as_dict(cfg))
    again = [f"{key}={text}" for key, text in settings.items() if run_settings.has_to_be_typed(key, text)]
    return shlex.join([*rank_environment.command(), str(PROJECT_ROOT / "train.py"), *again, f"out_dir={cfg.out_dir}"])


def how_to_go_on(cfg: schema.TrainConfig) -> str:
    """`; to go on: <command>` for a run. Nothing for a job: the sweep, which ends with it, says how to go on itself."""
    return "" if callback.running() else f"; to go on: {resume_command(cfg)}"


def launch(main: Callable[[], Any], script: str) -> None:
    """Runs a `@hydra.main` function and leaves the process with the documented exit code."""
    try:  # no line on which a signal raises stands outside of it
        interrupt.end_at_once()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra shall raise what goes wrong, not print it and exit with 1
        gc.set_threshold(400_000)  # a start makes 300,000 objects that all stay: searching them for garbage finds none
        threads.prepare(are_tokens_made=script == "generate")
        output.survive_closed_output()
        console.setup(all_to_stderr=script == "generate")
        code = run(main, script)
        if code and rank_environment.is_first():
            callback.remove_unused()
        if callback.running():
            failed = callback.close(interrupted=code >= 128)
            code = code or failed
        interrupt.end_without_raising()
    except KeyboardInterrupt as error:
        code = report(error)
    output.flush_and_exit(code, at_once=code != 0 and group_faults.joined())


def run(main: Callable[[], Any], script: str) -> int:
    """Executes the command and prints what goes wrong in one line. Returns the exit code."""
    try:
        return execute(main, script)
    except (Exception, KeyboardInterrupt) as error:
        return 0 if plugins.has_only_failed_jobs(error) else report(error)


def report(error: BaseException) -> int:
    """Prints what has ended a script in one line. Returns the exit code."""
    code, message = group_faults.settle(error, *explain(error))
    if message:
        console.error(message)
    return code


def execute(main: Callable[[], Any], script: str) -> int:
    """Starts the run or the sweep, or prints its cost (dry_run) or a report (report=...). Returns the exit code."""
    if not (PROJECT_ROOT / "conf").is_dir():
        raise UserError(
            "no conf/", str(PROJECT_ROOT), "run the script in a clone of the repository, or pip install -e ."
        )
    place = rank_environment.read()
    if place.count > 1 and script != "train":
        raise UserError(f"{script}.py is one process", f"WORLD_SIZE={place.count}", "start it without torchrun")
    if place.count > 1:  # what torch prints of a connection that breaks off is twenty lines, and is said in one
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not place.is_first:
        console.setup(silent=True)
        if arguments.only_shows(sys.argv[1:]):
            return 0
    if job := job_process.received(sys.argv[1:]):
        return job_process.run(main.__wrapped__, job)
    try:
        sys.argv[1:] = arguments.prepare(sys.argv[1:], script, architecture)
        hydra_patches.take_unknown_keys(not arguments.only_shows(sys.argv[1:]))
        main()
    except callback.DryRun as request:
        return dry_run.run(main, request) if place.is_first else 0
    except callback.Report as request:
        if not place.is_first:
            return 0
        from gpt.sweeps import comparison  # here, because it imports numpy and more

        names = validated(composition.without_hydra(request.config), schema_of(script)).report
        return comparison.answer(names, Path(request.config.hydra.sweep.dir).parent)
    except callback.Refused as refusal:
        raise refusal.error from None
    return 0


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for what ended a script; the traceback of a bug goes to a file."""
    # Hydra also raises AssertionError and the like for values of a wrong type
    if isinstance(error, COMPOSITION_ERRORS) or raised_in(error, "hydra", "omegaconf"):
        error = refused(error)
    else:
        error = plugins.explain(error) or error
    code = exit_code(error)
    if isinstance(error, UserError):
        return code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return code, str(error) or "interrupted"
    if code == ENVIRONMENT:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there" if is_full else "check that it can be read and written"
        return code, f"{error.strerror} ({error.filename}); {remedy}"
    log_file = console.save_traceback(error, absolute("outputs") / "errors" / f"{LAUNCH_ID}.txt")
    return code, f"{type(error).__name__}: {error} (this is a bug; the traceback is in {log_file})"


def refused(error: BaseException) -> UserError:
    """What Hydra has refused, in one line."""
    return user_error_behind(error) or UserError(hydra_message(error) or type(error).__name__, remedy=REMEDY)


def raised_in(error: BaseException, *packages: str) -> bool:
    """Whether the innermost frame of an error's traceback belongs to one of these packages."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).partition(".")[0] in packages


def hydra_message(error: BaseException) -> str:
    """The message of an error of Hydra's in one line, without the folders that it has searched."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: {error.problem}"
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    lines = [line for line in lines if line and not line.startswith(OMEGACONFS)]
    return " ".join(dict.fromkeys(lines)).partition(" Config search path:")[0]
