"""Knows a run, or a sweep, by its directory, and tells a directory that was copied from one that was moved."""

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from gpt.files import atomic
from gpt.files.directory import cannot_write
from gpt.files.json_file import read_object
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

RECORD = "run.json"  # {"id": "8d1f...", "directory": "/home/me/outputs/runs/a", "copied_from": null}


def settle(run_dir: Path, recorded: str | None = None) -> None:
    """Records the run's id and where it is, links resolved. Where the place in the record still has the same run, this
    is a copy: it becomes a run of its own, in W&B as well, with a note of its origin. Else it was moved, and goes on.
    A sweep has such a record, too, and so has each of its jobs.

    `recorded`: the directory that its checkpoint names, for a run of before there was a record. Raises UserError (5)
    when nothing can be written.
    """
    here = os.path.realpath(run_dir)
    before = read(run_dir) or {"id": _wandb_id(run_dir), "directory": recorded and os.path.realpath(recorded)}
    if before["directory"] == here and before.get("id"):
        if (run_dir / RECORD).exists():
            return
    elif before["id"] and before["directory"] and _has_run(Path(before["directory"]), before["id"], run_dir):
        log.info(f"copied from {escape(before['directory'])}: this is a new one from here on")
        (run_dir / "wandb.json").unlink(missing_ok=True)
        before = {"id": None, "copied_from": before["directory"]}
    record = {"id": before["id"] or secrets.token_hex(8), "directory": here, "copied_from": before.get("copied_from")}
    try:
        atomic.write(run_dir / RECORD, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(run_dir, error) from error


def read(run_dir: Path) -> dict[str, Any] | None:
    """The record in a directory; None when there is none, or none that this program has written."""
    with contextlib.suppress(OSError, ValueError):
        record = read_object(run_dir / RECORD, largest=100_000)
        if all(isinstance(record.get(key), str) for key in ("id", "directory")):
            return record
    return None


def _wandb_id(run_dir: Path) -> str | None:
    """What tells runs of older versions apart."""
    with contextlib.suppress(OSError, ValueError):
        run_id = read_object(run_dir / "wandb.json", largest=100_000).get("id")
        return run_id if isinstance(run_id, str) else None
    return None


def _has_run(directory: Path, run_id: str, here: Path) -> bool:
    """Whether another directory than `here` holds the run."""
    try:
        if os.path.samefile(directory, here):  # one directory that is mounted twice
            return False
    except (OSError, ValueError):
        return False
    record = read(directory)
    return (record["id"] if record else _wandb_id(directory)) == run_id
