"""Runs one job of a sweep in the processes that torchrun has started for it.

What gpt/sweeps/group_launcher.py has composed comes in a file, and the job goes through the
same callbacks as with any other launcher, in each process of the group.
"""

import json
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from gpt.errors import UserError, exit_code
from gpt.files import atomic
from gpt.machine import rank_environment
from gpt.sweeps import workers

FLAG = "--job"  # the first argument of such a process; the second is the file


@dataclass(frozen=True)
class Assignment:
    """A job as its processes get it."""

    hydra_context: HydraContext  # with the files of conf/ as they were when the sweep started
    singletons: dict[type, Any]  # Hydra's, with which evaluate_at_end composes its settings
    config: DictConfig


@dataclass(frozen=True)
class Fault:
    """What has ended a process of the group: one line, and the exit code of the process."""

    error: str
    code: int


def packed(hydra_context: HydraContext, config: DictConfig) -> bytes:
    """What the processes of a job get, for `run`. They are of the same user and the same project."""
    return pickle.dumps(Assignment(hydra_context, Singleton.get_state()["instances"], config))


def received(arguments: Sequence[str]) -> Path | None:
    """The file of the job that this process is to run, from its command line; None for any other process."""
    return Path(arguments[1]) if list(arguments[:1]) == [FLAG] and len(arguments) > 1 else None


def run(task: Callable[[DictConfig], Any], path: Path) -> int:
    """Runs the job, whose end the callbacks record. Returns the exit code that it would have had alone."""
    assignment: Assignment = pickle.loads(path.read_bytes())
    rank = rank_environment.read().rank
    note = path.with_name(f"fault-{rank}.json")
    note.unlink(missing_ok=True)  # of before torchrun has started all processes again
    codes = []

    def noting(cfg: DictConfig) -> Any:
        try:
            return workers.run_isolated(task, cfg)
        except Exception as error:
            is_end = isinstance(error, workers.Ended)
            codes.append(128 + signal.SIGTERM if is_end else exit_code(error))
            if not is_end:
                atomic.write(note, json.dumps({"error": workers.explain(error), "code": codes[0]}))
            if not is_end and not isinstance(error, UserError) and rank != 0:
                traceback.print_exc()  # that of the first process is saved when its end is recorded
            raise

    setup_globals()
    Singleton.set_state(Singleton.get_state() | {"instances": assignment.singletons})
    run_job(
        hydra_context=assignment.hydra_context, task_function=noting, config=assignment.config,
        job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip
    return codes[0] if codes else 0


def first_fault(folder: Path) -> Fault | None:
    """The one that came first of those that the processes of a group have noted beside their file."""
    notes = sorted(folder.glob("fault-*.json"), key=lambda note: note.stat().st_mtime_ns)
    return Fault(**json.loads(notes[0].read_text(encoding="utf-8"))) if notes else None
