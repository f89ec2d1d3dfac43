"""Finds the run that generate.py's `checkpoint` means: the newest one, or the best job of a sweep."""

from pathlib import Path

from gpt.config.places import LATEST
from gpt.errors import CHECKPOINT, UserError
from gpt.files.directory import SWEEP, has_any
from gpt.files.paths import PROJECT_ROOT
from gpt.runs import catalogue
from gpt.sweeps import leaderboard

OUTPUTS = PROJECT_ROOT / "outputs"
CHECKPOINTS = "checkpoints/step_*"


def resolve(name: str, outputs: Path = OUTPUTS) -> str:
    """What `checkpoint` means: for "latest" the run or sweep in `outputs` that has written metrics last, for the
    folder of a sweep its best job; any other name stays. Raises UserError (3) where there is no such run."""
    if name == LATEST:
        found = newest(outputs)
        if found is None:
            raise UserError("there is no run yet", str(outputs), "make one: python train.py", CHECKPOINT)
        name = str(found)
    directory = Path(name)
    if not directory.is_dir() or not has_any(directory, SWEEP):
        return name
    best = leaderboard.best_job(directory)
    if best is None:
        raise UserError("no job of the sweep has a val/loss yet", str(directory), "name one of its jobs", CHECKPOINT)
    return str(best.folder)


def newest(outputs: Path = OUTPUTS) -> Path | None:
    """The run with a checkpoint that has written a row of metrics last, or the sweep whose job it is; None where there
    is none. Runs of `debug=` do not count."""
    sweeps = outputs / "sweeps"
    for run in catalogue.newest_first(outputs / "runs", sweeps):
        if any(run.glob(CHECKPOINTS)):
            return run.parent if run.is_relative_to(sweeps) else run
    return None
