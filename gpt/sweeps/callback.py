"""Records the jobs of a sweep when Hydra starts and ends them (conf/hydra/callbacks/sweep.yaml).

Hydra prints only the first failed job of a sweep, starts all of them again each time, and knows no closing step when
one has failed. So gpt/sweeps/selection.py decides which jobs its launcher gets, the callback below records each of them
in the process in which it runs, and gpt/config/launch.py's `launch` calls `close` at the end.
"""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from gpt.config.schema import TrainConfig, WandbConfig
from gpt.config.value_errors import find_errors
from gpt.errors import Interrupted, UserError
from gpt.files import directory
from gpt.files.paths import absolute
from gpt.machine import group_faults, rank_environment
from gpt.sweeps import composition, hydra_patches, jobs, plugins, submitit_tasks, workers
from gpt.sweeps.jobs import Job
from gpt.sweeps.selection import SelectingLauncher
from gpt.terminal import console

_made: list[Path] = []  # folders that were not there before this start
_running: tuple[Path, WandbConfig] | None = None  # the sweep of this process, from its first job on


class OtherRequest(BaseException):
    """Something else than a run is requested. Raised before Hydra makes a directory; of an Exception in a callback
    Hydra makes a warning."""

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader


class DryRun(OtherRequest):
    """dry_run=true: what it would cost."""


class Report(OtherRequest):
    """report=...: what has come of a sweep, or of some runs."""


class Refused(BaseException):
    """A sweep cannot start. It carries the UserError through Hydra, like `OtherRequest`."""

    def __init__(self, error: UserError) -> None:
        self.error = error


class SweepCallback(Callback):
    """Told when a run or a sweep starts and, in the process of a job, when the job starts and ends."""

    def __init__(self) -> None:
        self._launched_by = _process()
        self._started = time.monotonic()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        loader = GlobalHydra.instance().config_loader()  # which it forgets on the way out
        if OmegaConf.select(config, "report") is not None:
            raise Report(config, loader)
        if OmegaConf.to_container(config, resolve=False).get("dry_run") is True:
            raise DryRun(config, loader)
        is_sweep = config.hydra.mode == RunMode.MULTIRUN
        _check(config, loader, is_sweep)
        _made[:] = directory.missing(_settle_place(config, "sweep" if is_sweep else "run"))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.on_run_start(config)
        try:
            if (n_ranks := rank_environment.read().count) > 1:
                remedy = "let the sweep start ranks for each job: python train.py -m hydra/launcher=torchrun "
                remedy += f"hydra.launcher.nproc_per_node={n_ranks} ..."
                raise UserError("a sweep is one process", f"WORLD_SIZE={n_ranks}", remedy)
            plugins.check(config)
        except UserError as error:
            raise Refused(error) from None
        loader = GlobalHydra.instance().config_loader()
        hydra_patches.freeze(loader)

        def select(launcher: Launcher, task: Callable[[DictConfig], Any]) -> Launcher:
            plugins.silence()
            return SelectingLauncher(launcher, config, loader, task, _begin)

        hydra_patches.wrap_launcher(select)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        if self._launched_by != _process():
            launcher = str(config.hydra.launcher._target_)
            if "submitit" in launcher:
                submitit_tasks.prepare()
            # joblib unblocks SIGINT in its processes. They get SIGTERM: a second signal would be too much.
            workers.prepare_process(leave_group="joblib" in launcher)
        if workers.is_ending() or not rank_environment.read().is_first:
            return
        self._started = time.monotonic()
        job = _recorded(config)
        console.announce(f"job {job.id}: {job.name or 'no axis'}")
        jobs.write(replace(job, status="running", error=None, code=None, log=None))  # stays so when it is killed

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            self._end_alone(config, job_return)
            return
        error = job_return._return_value  # `return_value` raises the job's exception again
        failure = _failure(error) if job_return.status != JobStatus.COMPLETED else None
        if rank_environment.read().is_first:
            self._record_end(config, error, failure)
        if failure is not None:
            # Recorded and reported. Hydra would report the first failure a second time, skip later batches of jobs, and
            # keep each exception, hence each model, until the sweep ends. A sweeper sees a job without a value.
            job_return.status, job_return._return_value = JobStatus.COMPLETED, None
            if isinstance(error, workers.Ended):
                submitit_tasks.queue_again()
            _release(error)

    def _record_end(self, config: DictConfig, error: Any, failure: tuple[int, str] | None) -> None:
        """`failure`: the exit code and the line for the `error` of a job that has not come to its end."""
        started = _recorded(config)
        job = replace(started, seconds=round(started.seconds + time.monotonic() - self._started, 3))
        if failure is None:
            jobs.write(_ended(job, config))
        elif isinstance(error, workers.Ended) and failure[0] >= 128:
            jobs.write(replace(job, status="interrupted") if started.status == "running" else started)
        else:
            where, (code, message) = str(_log_of(error, job.folder)), failure
            job = replace(job, status="failed", code=code, error=message, log=where)
            jobs.write(job)
            console.error(jobs.failure(job))

    def _end_alone(self, config: DictConfig, job_return: JobReturn) -> None:
        """Records the end of a job that its folder alone has continued, with the settings by which it is known."""
        if job_return.status != JobStatus.COMPLETED or not rank_environment.is_first():
            return
        job = jobs.load(Path(config.hydra.runtime.output_dir))
        if job is not None and job.config == jobs.current(composition.identity(config)):
            seconds = round(job.seconds + time.monotonic() - self._started, 3)
            jobs.write(_ended(replace(job, seconds=seconds, error=None, code=None, log=None), config))


def remove_unused() -> None:
    """Removes the folders that this start has made and that hold nothing, because it was refused."""
    directory.remove_unused(_made, ("train.log", "run.json", "multirun.yaml"))


def _settle_place(config: DictConfig, kind: str) -> Path:
    """The directory of a run or of a sweep, which is absolute from here on, for the jobs too: one that stands in a YAML
    file begins at the project. Hydra would have it begin where the user is."""
    place = absolute(str(config.hydra[kind].dir))
    with read_write(config.hydra):
        config.hydra[kind].dir = str(place)
        config.hydra.overrides.hydra.append(f"hydra.{kind}.dir={QuotedString(str(place), Quote.single).with_quotes()}")
    return place


def _check(config: DictConfig, loader: ConfigLoader, is_sweep: bool) -> None:
    """Raises Refused for wrong values before Hydra makes a folder: of a sweep for those that name one; the others are
    reported with the jobs."""
    try:
        if is_sweep and composition.is_known(config):
            config = composition.compose(config, loader, composition.all_jobs(config, loader)[0], 0)
        errors = find_errors(composition.without_hydra(config), TrainConfig, config.hydra.runtime.choices)
        if errors and not (is_sweep and not any(error.startswith("sweep.") for error in errors)):
            raise UserError("; ".join(errors), remedy="all keys and groups: --help and --cfg job")
    except UserError as error:
        if not is_sweep or error.what.startswith("sweep.") or "; sweep." in error.what:
            raise Refused(error) from None
    except HydraException:
        if not is_sweep:
            raise
        # All jobs are composed again when they are planned: here it would be a warning of Hydra's.


def running() -> bool:
    """Whether this process runs a sweep that is not closed yet."""
    return _running is not None


def close(interrupted: bool) -> int:
    """Writes and prints the result of the sweep of this process; nothing goes to W&B when it was `interrupted`. Returns
    the exit code: 1 if a job failed or did not end, else 0."""
    global _running
    if _running is None:
        raise RuntimeError("no sweep is running")
    from gpt.sweeps import summary  # which takes numpy and more

    (folder, wandb), _running = _running, None
    return summary.close(folder, None if interrupted else wandb)


def _begin(folder: Path, configs: list[DictConfig]) -> None:
    """A sweep goes to W&B as its first jobs do, with the tags of all of them: what tags stand for may be swept."""
    global _running
    settings = [WandbConfig(**OmegaConf.to_container(config.wandb, resolve=True)) for config in configs]
    tags = dict.fromkeys(tag for one in settings for tag in one.tags)
    _running = folder, replace(settings[0], tags=list(tags))


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _recorded(config: DictConfig) -> Job:
    folder = Path(config.hydra.runtime.output_dir)
    return jobs.load(folder) or composition.as_job(config, config.hydra.job.num, set())


def _ended(job: Job, config: DictConfig) -> Job:
    """A job whose function has returned: its newest checkpoint says whether it came to its end."""
    from gpt.progress import is_finished
    from gpt.runs import checkpoint

    steps = checkpoint.listed(job.folder / "checkpoints")
    if not steps:  # of a script that keeps none
        return replace(job, status="completed")
    progress, settings = checkpoint.read_manifest(steps[-1]).progress, checkpoint.read_config(steps[-1])
    pause_at = config.sweep.pause_at
    if is_finished(progress, config.train, settings["total_steps"]):
        status = "completed"
    else:
        status = "paused" if pause_at is not None and progress.tokens >= pause_at else "stopped"
    return replace(job, status=status, fingerprint=settings["data"]["fingerprint"])


def _failure(error: BaseException) -> tuple[int, str]:
    """Exit code and line for what has ended a job. Of several ranks, the one whose fault it is knows both."""
    if isinstance(error, workers.Ended):
        error = error.__cause__ or Interrupted(signal.SIGTERM)
    return group_faults.settle(error, getattr(error, "code", 1), workers.explain(error))


def _log_of(error: BaseException, folder: Path) -> Path:
    if not isinstance(error, UserError | workers.Ended):
        return console.save_traceback(error, folder / "traceback.txt")
    return folder / "train.log" if (folder / "train.log").exists() else folder


def _release(error: BaseException | None) -> None:
    """Empties the frames of an exception: one that refers to itself would keep the job's model for a while yet."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
