"""Locks the directory of a run for one process, and checks that it is one, can be written and has room."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import lock_descriptor

from gpt.errors import ENVIRONMENT, IN_USE, UserError
from gpt.terminal.console import escape

LOCK = ".lock"  # the first file of every run, which marks its directory: " pid 17 since 2026-01-31 12:00:00"
# What a directory is known by that was copied without its hidden files, or made before there was a lock.
RUN, SWEEP = ("checkpoints/step_*", "job.json"), ("sweep.json", "*/job.json")
# A folder of these alone is empty. Hydra writes the second before the run begins.
NOBODYS = {LOCK, ".hydra", ".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", "lost+found"}
# Seconds. `is_owned` holds a lock for an instant: there is no lock that several may hold on every system.
PATIENCE, PATIENCE_OF_A_LOOK = 0.3, 0.05


@contextlib.contextmanager
def owned(run_dir: Path, what: str = "run dir", remedy: str = "", marks: tuple[str, ...] = RUN) -> Iterator[None]:
    """Nobody else runs in `run_dir` during the `with` block: raises UserError (6) if somebody does, (5) if nothing can
    be written there, (2) if it has files and none of `marks`, or is a sweep's where a run is meant. The system frees
    the lock of a process that ends, however it ends."""
    path, remedy = run_dir / LOCK, remedy or f"choose {another(run_dir)}"
    try:
        check_owner(run_dir, what, remedy, marks)
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, open as long as the lock is held
    except OSError as error:
        raise cannot_write(run_dir, error) from error
    with file:
        try:
            is_mine = _lock(file.fileno(), PATIENCE)
        except OSError as error:  # a file system without locks
            raise cannot_write(run_dir, error) from error
        if not is_mine:
            owner = last_owner(path) or "another process"
            raise UserError(f"{what} in use by {owner}", str(run_dir), f"wait for it, or {remedy}", IN_USE)
        try:
            file.truncate(0)
            file.write(f" pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        except OSError as error:
            raise cannot_write(run_dir, error) from error
        yield


def check_owner(run_dir: Path, what: str, remedy: str, marks: tuple[str, ...]) -> None:
    """Raises UserError (2) for a directory with somebody's own files: not empty, no lock of ours, none of `marks`; and
    for a sweep's where a run is meant."""
    if not run_dir.is_dir():
        return
    names = sorted({path.name for path in run_dir.iterdir()} - NOBODYS)
    if has_any(run_dir, marks):
        return
    if marks is RUN and has_any(run_dir, SWEEP):
        raise UserError("a sweep, and no run", str(run_dir), "name one of its jobs, or type the sweep's own command")
    if names and not last_owner(run_dir / LOCK):
        raise UserError(f"not empty, and no {what}: it has {escape(names[0])}", str(run_dir), remedy)


def has_any(folder: Path, marks: tuple[str, ...]) -> bool:
    return any(any(folder.glob(mark)) for mark in marks)


def last_owner(lock: Path) -> str:
    """ "pid 17 since 2026-01-31 12:00:00", for people: the process that has locked a directory last. Empty where none
    has. The first byte is not read: it is the one that is locked, which Windows shows to nobody else."""
    with contextlib.suppress(OSError):
        if lock.is_file():  # no pipe, which would be waited for
            with open(lock, "rb") as file:
                file.seek(1)
                words = re.match(r"p?(id .*)", file.read(100).decode(errors="replace"))  # older versions: no space
            return escape(f"p{words[1]}") if words else ""
    return ""


def is_owned(run_dir: Path) -> bool:
    """Whether a process runs in `run_dir`."""
    lock = run_dir / LOCK
    try:  # NFS locks only what is open for writing; elsewhere, those who may only read can look as well
        with open(lock, "rb+" if os.access(lock, os.W_OK) else "rb") as file:
            return not _lock(file.fileno(), PATIENCE_OF_A_LOOK)
    except OSError:  # no such file, or a file system without locks
        return False


def missing(directory: Path) -> list[Path]:
    """The directory and those above it that do not exist, the lowest first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def remove_unused(directories: list[Path], files: Collection[str] = ()) -> None:
    """Removes directories, as `missing` lists them, in which is nothing but `files`, which a refused start has made."""
    with contextlib.suppress(OSError):
        for path in directories:
            for name in os.listdir(path) if set(os.listdir(path)) <= {LOCK, *files} else ():
                (path / name).unlink()
            path.rmdir()


def _lock(descriptor: int, patience: float) -> bool:
    """Locks an open file, which closing it ends; returns False when somebody else keeps it locked for so long."""
    end = time.monotonic() + patience
    while not lock_descriptor(descriptor, blocking=False):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def cannot_write(run_dir: Path, error: OSError) -> UserError:
    """The error for a run directory that cannot be used."""
    what = f"cannot write to the run directory: {error.strerror}"
    return UserError(what, str(run_dir), f"choose {another(run_dir)}", ENVIRONMENT)


def another(run_dir: Path) -> str:
    """What to choose in place of a run directory: in a sweep, no out_dir is taken."""
    files = (run_dir / "job.json", run_dir / "sweep.json", run_dir.parent / "sweep.json")
    return "another sweep.name" if any(path.exists() for path in files) else "another out_dir"


def check_space(run_dir: Path, n_checkpoints: int, bytes_each: int) -> None:
    """Raises UserError (5) when the disk has no room for so many checkpoints."""
    needed, free = n_checkpoints * bytes_each, shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"not enough disk space: {n_checkpoints} checkpoints of {in_bytes(bytes_each)} need {in_bytes(needed)}, "
            f"{in_bytes(free)} free",
            str(run_dir), f"lower train.keep_checkpoints, choose {another(run_dir)}, or make room", ENVIRONMENT,
        )  # fmt: skip


def in_bytes(number: int) -> str:
    """1,500,000,000 -> 1.5 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
