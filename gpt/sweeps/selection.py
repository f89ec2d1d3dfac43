"""Selects the jobs of a sweep that are not done, and says so before the first one starts.

Hydra's sweepers make the jobs and its launchers run them. `SelectingLauncher` stands between the two: it knows each job
by its resolved settings, leaves out those that are done, and refuses all when one of them cannot run.
"""

import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from gpt.errors import ENVIRONMENT, IN_USE, USAGE, UserError
from gpt.files import atomic
from gpt.files.directory import SWEEP, cannot_write, owned
from gpt.files.paths import PROJECT_ROOT
from gpt.runs import origin, wandb_description, wandb_run
from gpt.sweeps import composition, halving, jobs, workers
from gpt.sweeps.group_launcher import GroupLauncher
from gpt.sweeps.jobs import Job
from gpt.terminal import console

log = logging.getLogger(__name__)

DONE = ("completed", "stopped")  # the same command does not start them again


@dataclass(frozen=True)
class Planned:
    """A job of this start: as Hydra's sweeper wants it, as Hydra composes it, and what is known of it."""

    overrides: list[str]
    config: DictConfig
    job: Job


class SelectingLauncher(Launcher):
    """A launcher that hands on to another one the jobs that are not done, and knows what came of the others."""

    def __init__(
        self, launcher: Launcher, config: DictConfig, loader: ConfigLoader, task: Callable[[DictConfig], Any],
        on_begin: Callable[[Path, list[DictConfig]], None],
    ) -> None:  # fmt: skip
        """`task` runs a job; `on_begin` is called with the sweep's directory and the first jobs before these.

        Raises UserError when another process runs this sweep (6), or when another version of this project made it.
        """
        self._launcher, self._config, self._loader = launcher, config, loader
        self._task, self._on_begin = task, on_begin
        self._directory = Path(str(config.hydra.sweep.dir)).absolute()
        self._planned: dict[tuple[str, ...], Planned] = {}
        self._lock = contextlib.ExitStack()  # held until the process ends
        name, remedy = f"sweep {self._directory.name}", "choose another sweep.name"
        self._lock.enter_context(owned(self._directory, name, remedy, SWEEP))
        check_format(self._directory)
        origin.settle(self._directory, place_of_jobs(self._directory))

    def setup(self, **kwargs: Any) -> None:
        """Nothing: Hydra has set up the other launcher."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs those of these jobs that are not done. Returns what is known of all of them.

        Raises UserError before the first one starts when one of them, or of the whole sweep where its jobs are known
        from the start, cannot run.
        """
        wanted = [tuple(overrides) for overrides in job_overrides]
        known = composition.is_known(self._config)
        if self._config.sweep.rungs and not known:
            raise UserError("sweep.rungs", "hydra/sweeper", "successive halving needs a sweep whose jobs are known")
        if any(overrides not in self._planned for overrides in wanted):
            self._make_plan(composition.all_jobs(self._config, self._loader) if known else list(job_overrides))
        alive = list({self._planned[overrides].job.id: self._planned[overrides] for overrides in wanted}.values())
        ended = [one for one in alive if one.job.status in DONE]
        for rung in [*self._config.sweep.rungs, None]:
            self._run([one for one in alive if _is_due(one.job, rung)], rung)
            alive = [replace(one, job=jobs.read_one(one.job.folder)) for one in alive]
            if rung is not None:
                alive = self._halve(alive, rung)
        self._send_rest(ended)
        return [_result(jobs.read_one(self._planned[overrides].job.folder)) for overrides in wanted]

    def _make_plan(self, all_overrides: list[Sequence[str]]) -> None:
        before = {jobs.name_of(job.config): job for job in jobs.read(self._directory)}
        planned = plan(self._config, self._loader, all_overrides, before)
        by_id = {one.job.id: one.job for one in planned.values()}
        running = [job.id for job in by_id.values() if job.status == "running"]
        if running:  # those of a launcher whose launching process was killed
            what = f"{len(running)} of {len(by_id)} jobs still run without it: {', '.join(running)}"
            raise UserError(what, str(self._directory), "wait for them, or end them", IN_USE)
        if composition.is_known(self._config):
            check_axes(planned)
            check_jobs(
                planned,
                lambda one: fingerprint(self._task, one.config, one.job.folder),
                workers.are_elsewhere(self._config),
            )
            warn_of_doubles([planned[tuple(overrides)].job for overrides in all_overrides])
            console.say(describe(list(by_id.values()), len({job.id for job in before.values()} - by_id.keys())))
        elif not self._planned:  # what the sweeper tries may be impossible, and fails alone; the rest shall not be
            fingerprint(self._task, self._config, self._directory)
            console.say(f"the sweeper chooses the jobs; {len(before)} of this sweep are there already")
        for job in by_id.values():
            if job.status not in DONE:
                jobs.write(job)
        if not self._planned:
            _write_facts(self._directory)
            self._on_begin(self._directory, [one.config for one in planned.values()])
        self._planned |= planned

    def _run(self, due: list[Planned], rung: int | None) -> None:
        """As far as the rung, or to the end."""
        if not due:
            return
        pause = [] if rung is None else [f"sweep.pause_at={rung}"]
        end = self._launcher.end if isinstance(self._launcher, GroupLauncher) else None
        with workers.launching(self._config, len(due), end):
            self._launcher.launch([[*one.overrides, *pause] for one in due], initial_job_idx=0)

    def _send_rest(self, ended: list[Planned]) -> None:
        """Sends what W&B lacks of jobs that an earlier start has ended, until it does not take that of one."""
        lacking = [one for one in ended if wandb_description.is_incomplete(one.job.folder)]
        if not lacking or not wandb_run.is_online(str(self._config.wandb.mode)):
            return
        from gpt.runs import checkpoint, results, run_log  # which take torch

        for one in lacking:
            folder = one.job.folder
            cfg = replace(composition.cost(self._task, one.config, folder).cfg, dry_run=False)
            progress = checkpoint.read_manifest(checkpoint.listed(folder / "checkpoints")[-1]).progress
            with contextlib.suppress(UserError), owned(folder), console.log_to(folder / "train.log"):
                origin.settle(folder)
                run_log.send_rest(cfg, folder, folder / results.LAST_MODEL, progress)
            if wandb_description.is_incomplete(folder):
                return

    def _halve(self, alive: list[Planned], rung: int) -> list[Planned]:
        kept = {job.id for job in halving.survivors([one.job for one in alive], rung, self._config.sweep.keep)}
        for one in alive:
            if one.job.id not in kept and one.job.status == "paused":
                jobs.write(replace(one.job, status="halved"))
        console.say(f"rung at {rung:,} tokens: {len(kept)} of {len(alive)} jobs go on")
        return [one for one in alive if one.job.id in kept]


def place_of_jobs(directory: Path) -> str | None:
    """The sweep's directory as the record of a job names it, for a sweep of before it had a record of its own."""
    records = (origin.read(path.parent) for path in directory.glob("*/job.json"))
    return next((str(Path(record["directory"]).parent) for record in records if record), None)


def plan(
    config: DictConfig, loader: ConfigLoader, all_overrides: Iterable[Sequence[str]], before: dict[str, Job]
) -> dict[tuple[str, ...], Planned]:
    """The jobs with these overrides, by their overrides. `before`: those that the sweep has, by the names that their
    folders would have today; one that an older version has made is in another folder, and stays there."""
    swept = {axis.key_or_group for axis in composition.axes(config, loader) if axis.is_sweep_override()}
    number = max((job.number for job in before.values() if job.status != "damaged"), default=-1) + 1
    by_name: dict[str, Planned] = {}
    planned = {}
    for overrides in all_overrides:
        job_config = composition.compose(config, loader, list(overrides), len(planned))
        job = composition.as_job(job_config, number, swept)
        name = job.id
        if name not in by_name:
            earlier = before.get(name)
            if earlier and earlier.status != "damaged":
                job = replace(earlier, overrides=job.overrides, name=job.name)
            else:
                number += 1
                job = replace(job, status="interrupted", folder=earlier.folder) if earlier else job
            by_name[name] = Planned(_named(config, overrides, job), job_config, job)
        planned[tuple(overrides)] = by_name[name]
    return planned


def warn_of_doubles(planned: list[Job]) -> None:
    """One line for all jobs that come more than once."""
    counts = Counter(job.id for job in planned)
    doubled = {job.id: job.name for job in planned if counts[job.id] > 1}
    if doubled:
        n = len(planned) - len(counts)
        log.warning(f"{n} of {len(planned)} jobs are doubles, and run once: {', '.join(doubled.values())}")


def check_axes(planned: dict[tuple[str, ...], Planned]) -> None:
    """Raises UserError for an axis that makes no difference to any job."""
    values: dict[str, set[str]] = {}
    for overrides in planned:
        for override in overrides:
            values.setdefault(jobs.override_key(override), set()).add(override)
    for key, chosen in values.items():
        without: dict[tuple[str, ...], set[str]] = {}
        for overrides, one in planned.items():
            others = tuple(override for override in overrides if jobs.override_key(override) != key)
            without.setdefault(others, set()).add(one.job.id)
        if len(chosen) > 1 and all(len(ids) == 1 for ids in without.values()):
            raise UserError(f"the axis {', '.join(sorted(chosen))} changes nothing", remedy="leave it out")


def check_jobs(
    planned: dict[tuple[str, ...], Planned], fingerprint_of: Callable[[Planned], str], are_elsewhere: bool
) -> None:
    """Raises UserError naming every job that cannot run, or that was trained on other data than there is now.

    `fingerprint_of` tells that of a job's data, or raises what would stop the job. `are_elsewhere`: what this machine
    lacks, that of the jobs may have.
    """
    unique = {one.job.id: one for one in planned.values()}
    faults: dict[str, list[str]] = {}
    remedies, codes, of_data = {}, [USAGE], {}
    for one in unique.values():
        data = str({key: value for key, value in one.job.config.items() if key.startswith("data.")})
        try:
            if one.job.status not in DONE or data not in of_data:
                of_data[data] = fingerprint_of(one)
            if one.job.fingerprint not in (None, of_data[data]):
                was = f"begun on data of fingerprint {one.job.fingerprint}, which is now {of_data[data]}"
                raise UserError(was, remedy="choose another sweep.name")
        except UserError as error:
            if error.code != ENVIRONMENT or not are_elsewhere:
                what = str(UserError(error.what, error.where))
                faults.setdefault(what, []).append(one.job.name or one.job.id)
                remedies[error.remedy] = codes.append(error.code)
    if len(faults) == 1 and len(next(iter(faults.values()))) == len(unique):
        raise UserError(next(iter(faults)), remedy="; ".join(filter(None, remedies)), code=max(codes))
    if faults:
        # A job of one axis is called by the very key that is wrong.
        about = {
            what: ", ".join(name for name in names if not what.startswith(f"{name}:")) for what, names in faults.items()
        }
        listed = "; ".join(f"{names}: {what}" if names else what for what, names in about.items())
        what = f"{sum(map(len, faults.values()))} of {len(unique)} jobs cannot run, so none was started: {listed}"
        raise UserError(what, remedy="; ".join(filter(None, remedies)), code=max(codes))


def fingerprint(task: Callable[[DictConfig], Any], config: DictConfig, folder: Path) -> str:
    """Of the data that a job would train on. Raises UserError for what would stop the job."""
    from gpt.data import preparation, prepared, sources  # later than a word on a wrong command line

    cost = composition.cost(task, config, folder)
    is_typed = sources.path_is_typed(cost.cfg.overrides, cost.cfg.out_dir)
    data = prepared.find(cost.cfg.data, PROJECT_ROOT, is_typed)
    if data is None:
        data = preparation.ensure(cost.cfg.data, PROJECT_ROOT, is_typed)
        composition.cost(task, config, folder)  # now that there is data, does it suit the job?
    return data.meta["fingerprint"]


def describe(planned: list[Job], n_others: int) -> str:
    """12 jobs: 7 done, 1 resumes at step 120, 1 failed (again), 3 new"""
    from gpt.runs.checkpoint import listed

    counts: dict[str, list[Job]] = {}
    for job in planned:
        has_steps = job.status in ("interrupted", "paused", "running") and listed(job.folder / "checkpoints")
        kind = {"completed": "done", "stopped": "stopped", "failed": "failed", "halved": "halved"}.get(job.status)
        counts.setdefault(kind or ("resumes" if has_steps else "new"), []).append(job)
    steps = [str(int(listed(job.folder / "checkpoints")[-1].name.split("_")[1])) for job in counts.get("resumes", [])]
    numbers = ", ".join(steps[:8]) + (", ..." if len(steps) > 8 else "")
    texts = {
        "done": "{} done",
        "stopped": "{} stopped from W&B",
        "halved": "{} halved",
        "resumes": f"{{}} resumes at step {numbers}" if len(steps) == 1 else f"{{}} resume at steps {numbers}",
        "failed": "{} failed (again)",
        "new": "{} new",
    }
    parts = [text.format(len(counts[kind])) for kind, text in texts.items() if kind in counts]
    text = f"{len(planned)} job{'s' if len(planned) != 1 else ''}: {', '.join(parts)}"
    return text + (f"; {n_others} more of this sweep are as they were" if n_others else "")


def check_format(directory: Path) -> None:
    """Raises UserError for a sweep that another version of this project has made."""
    for path in [directory / "sweep.json", *sorted(directory.glob("*/job.json"))]:
        try:
            made_by = json.loads(path.read_text(encoding="utf-8")).get("format", 1)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # none, or damaged: that is another matter
        if made_by != jobs.FORMAT:
            what = f"the sweep is of another version: format {made_by} != {jobs.FORMAT}"
            raise UserError(what, str(path), "its files are untouched; choose another sweep.name")


def _is_due(job: Job, rung: int | None) -> bool:
    return job.status not in DONE and (rung is None or halving.loss_at(job, rung) is None)


def _named(config: DictConfig, overrides: Sequence[str], job: Job) -> list[str]:
    """With the sweep's name: in another process a sweep without one would be named after the start of that process. And
    with the folder of a job that is there already."""
    name = [] if config.sweep.name else [f"sweep.name={Path(str(config.hydra.sweep.dir)).name}"]
    return [*overrides, *name, f"hydra.sweep.subdir='{job.id}'"]


def _result(job: Job) -> JobReturn:
    value = job.val_loss if job.status in DONE else None
    return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=value)


def _write_facts(directory: Path) -> None:
    """sweep.json: the format, and the command that goes on with the sweep."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("sweep.name=")]
    command = ["python", str(PROJECT_ROOT / "train.py"), *arguments, f"sweep.name={directory.name}"]
    facts = {"format": jobs.FORMAT, "name": directory.name, "command": command}
    try:
        atomic.write(directory / "sweep.json", json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(directory, error) from error
