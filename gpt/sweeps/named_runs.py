"""Finds the run that generate.py's `checkpoint` means: the newest one, or the best job of a sweep."""

from pathlib import Path

from gpt.config.places import LATEST
from gpt.errors import CHECKPOINT, UserError
from gpt.files.directory import SWEEP
from gpt.files.paths import PROJECT_ROOT
from gpt.sweeps import jobs, leaderboard
from gpt.sweeps.jobs import Job

OUTPUTS = PROJECT_ROOT / "outputs"
CHECKPOINTS = "checkpoints/step_*"


def resolve(name: str, outputs: Path = OUTPUTS) -> str:
    """What `checkpoint` means: for "latest" the run or sweep in `outputs` that has saved a checkpoint last, for the
    folder of a sweep its best job; any other name stays. Raises UserError (3) where there is no such run."""
    if name == LATEST:
        found = newest(outputs)
        if found is None:
            raise UserError("there is no run yet", str(outputs), "make one: python train.py", CHECKPOINT)
        name = str(found)
    directory = Path(name)
    if not directory.is_dir() or not any(any(directory.glob(mark)) for mark in SWEEP):
        return name
    best = best_job(directory)
    if best is None:
        raise UserError("no job of the sweep has a val/loss yet", str(directory), "name one of its jobs", CHECKPOINT)
    return str(best.folder)


def newest(outputs: Path = OUTPUTS) -> Path | None:
    """The run or the sweep that has saved a checkpoint last; None when there is none."""
    saved = {run: changed(run, CHECKPOINTS) for run in outputs.glob("runs/*")}
    saved |= {sweep: changed(sweep, f"*/{CHECKPOINTS}") for sweep in outputs.glob("sweeps/*")}
    last = max(saved, key=lambda path: saved[path], default=None)
    return last if last and saved[last] else None


def changed(directory: Path, pattern: str) -> float:
    """When the newest of what matches was made, in seconds since 1970; 0: there is none."""
    return max((path.stat().st_mtime for path in directory.glob(pattern)), default=0.0)


def best_job(directory: Path) -> Job | None:
    """Of the settings that are first in the leaderboard, the job with the lowest val/loss."""
    entries = leaderboard.entries(jobs.read(directory))
    return min(entries[0].counted, key=lambda job: job.val_loss, default=None) if entries else None
