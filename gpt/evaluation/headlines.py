"""Reads the one figure of each evaluation of a run that stands for all of them, for the tables of a sweep."""

import contextlib
from pathlib import Path

from gpt.files.json_file import read_object

FOLDER = "evaluations"  # of a run


def read(run_dir: Path, step: int) -> dict[str, float]:
    """{"answers_test ROUGE-L": 0.21} of the checkpoint of a step. What is damaged, or no result, is left out."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob(f"*_step_{step:08d}.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = read_object(path)
            name = content["headline"]
            found[f"{path.stem.rpartition('_step_')[0]} {name}"] = float(content["figures"]["model"][name]["value"])
    return found
