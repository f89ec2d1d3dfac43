"""Finds the runs below a folder, those of sweeps among them, by the files that a run leaves. No torch."""

import os
from itertools import chain
from pathlib import Path

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


def newest_first(*below: Path) -> list[Path]:
    """The directories of all runs below some folders, by the last time that a row of metrics was written. What cannot
    be read is passed over."""
    found, seen = [], set()
    walks = [os.walk(folder, followlinks=True) for folder in below]  # outputs/runs may be a link to a larger disk
    for place, folders, _ in chain.from_iterable(walks):
        here = os.path.realpath(place)
        if here in seen:  # a link to what is listed already, or in a circle
            folders.clear()
            continue
        seen.add(here)
        if is_run(Path(place)):
            found.append(Path(place))
            folders.clear()  # a run has no runs in it
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found, key=lambda run: (-_changed(run), run))


def is_run(folder: Path) -> bool:
    """Whether a run has got as far as its first evaluation there, or has a checkpoint."""
    return os.path.isfile(folder / METRICS) or os.path.isdir(folder / CHECKPOINTS)


def _changed(run: Path) -> float:
    """Seconds since 1970."""
    try:
        return os.stat(run / METRICS).st_mtime
    except OSError:
        return 0.0
