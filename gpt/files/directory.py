"""Locks the directory of a run for one process, and checks that it can be written and has room."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from gpt.errors import ENVIRONMENT, IN_USE, UserError
from gpt.terminal.console import escape

LOCK = ".lock"
PATIENCE = 0.3  # seconds; `is_owned` holds a lock for an instant


@contextmanager
def owned(run_dir: Path, what: str = "run dir", remedy: str = "choose another out_dir") -> Iterator[None]:
    """Nobody else runs in `run_dir` during the `with` block: raises UserError (6) if somebody does, (5) if nothing can
    be written there. The kernel frees the lock of a process that ends, however it ends."""
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, open as long as the lock is held
    except OSError as error:
        raise cannot_write(run_dir, error) from error
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            owner = escape(file.read(100).strip()) or "another process"
            raise UserError(f"{what} in use by {owner}", str(run_dir), f"wait for it, or {remedy}", IN_USE) from None
        except OSError as error:  # a file system without locks
            raise cannot_write(run_dir, error) from error
        try:
            file.truncate(0)
            file.write(f"pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        except OSError as error:
            raise cannot_write(run_dir, error) from error
        yield


def is_owned(run_dir: Path) -> bool:
    """Whether a process runs in `run_dir`."""
    try:
        with open(run_dir / LOCK, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def _lock(file: TextIO) -> None:
    """Raises BlockingIOError when another process keeps the lock."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def cannot_write(run_dir: Path, error: OSError) -> UserError:
    """The error for a run directory that cannot be used."""
    return UserError(
        f"cannot write to the run directory: {error.strerror}", str(run_dir), "set out_dir=...", ENVIRONMENT
    )


def check_space(run_dir: Path, n_checkpoints: int, bytes_each: int) -> None:
    """Raises UserError (5) when the disk has no room for so many checkpoints."""
    needed, free = n_checkpoints * bytes_each, shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"not enough disk space: {n_checkpoints} checkpoints of {in_bytes(bytes_each)} need {in_bytes(needed)}, "
            f"{in_bytes(free)} free",
            str(run_dir), "lower train.keep_checkpoints, choose another out_dir, or make room", ENVIRONMENT,
        )  # fmt: skip


def in_bytes(number: int) -> str:
    """1,500,000,000 -> 1.5 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
