"""Hands the jobs of a sweep to process groups, and reports what a group could not record itself.

Hydra's own launchers run a job in one process. Those below, for this machine and for a cluster, hand what Hydra has
composed to all processes of a group.
"""

import threading
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from gpt.sweeps import job_process, jobs
from gpt.sweeps.local_group import Outcome, Shape
from gpt.terminal import console

LOG = "torchrun.log"  # in a job's folder


class Group(Protocol):
    """A LocalGroup, or one that is elsewhere."""

    def run(self, job: bytes, shape: Shape, log: Path) -> Outcome | None: ...

    def end(self) -> None: ...


class GroupLauncher(Launcher):
    """Runs each job in a group of its own, several at once."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config  # the function is that of the script that torchrun starts
        self._groups: list[Group] = []
        self._is_ending = False
        self._opening = threading.Lock()  # so that each group is asked to end, or is not opened

    @abstractmethod
    def shapes(self, n_jobs: int) -> list[Shape]:
        """One for each of the groups that run at once. Raises UserError where there is too little for them."""

    @abstractmethod
    def open(self, shape: Shape) -> Group:
        """A group that has not started."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs. What has come of each is in its folder. Raises UserError as `shapes` does."""
        free: SimpleQueue[Shape] = SimpleQueue()
        for shape in self.shapes(len(job_overrides)):
            free.put(shape)

        def run(number: int, overrides: Sequence[str]) -> JobReturn:
            shape = free.get()
            try:
                self._run(number, list(overrides), shape)
            finally:
                free.put(shape)
            return JobReturn(overrides=overrides, status=JobStatus.COMPLETED)

        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        with ThreadPoolExecutor(free.qsize()) as pool:
            return list(pool.map(run, numbers, job_overrides))

    def end(self) -> None:
        """Asks all groups to save where they are and to end; no other is started."""
        with self._opening:
            self._is_ending = True
            groups = list(self._groups)
        for group in groups:
            group.end()

    def _run(self, number: int, overrides: list[str], shape: Shape) -> None:
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        with self._opening:
            if self._is_ending:
                return
            group = self.open(shape)
            self._groups.append(group)
        before = jobs.load(folder)
        outcome = group.run(job_process.packed(self._context, config), shape, folder / LOG)
        with self._opening:
            self._groups.remove(group)
        if outcome is not None and outcome.code != 0 and not self._is_ending:
            report(before, folder, outcome)


def report(before: jobs.Job | None, folder: Path, outcome: Outcome) -> None:
    """Prints why a group has ended, and records it where the group's first process did not live to do so. `before`: the
    job's record before the start."""
    job = jobs.load(folder)
    if job is None or job.status in ("completed", "stopped", "paused"):
        return
    has_begun, fault, log = job != before, outcome.fault, str(folder / LOG)
    if not has_begun and fault is None:
        what = "its processes ended before it began"
        jobs.write(job := replace(job, status="failed", error=what, code=1, log=log))
    elif not has_begun or job.status != "failed":  # nothing is recorded of this start
        status = "interrupted" if fault is None else "failed"
        error, code = (fault.error, fault.code) if fault else (None, None)
        jobs.write(job := replace(job, status=status, error=error, code=code, log=log))
    console.error(jobs.failure(job))
