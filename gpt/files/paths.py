"""Names the places of this project: its root, what a path in a configuration is relative to, the start of a process."""

import glob
import os
import secrets
import time
from pathlib import Path

_ABOVE = Path(__file__).resolve().parents[2]
# `pip install .` copies gpt/ alone to a place that is nobody's to write to; paths are relative to where the user is.
PROJECT_ROOT = _ABOVE if (_ABOVE / "conf" / "train.yaml").exists() else Path.cwd()
# Two starts in the same second must not share a directory.
LAUNCH_ID = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"


def absolute(path: str, start: Path = PROJECT_ROOT) -> Path:
    """The place that a path names. Paths in a configuration are relative to the project; those that a person types are
    relative to where they are, and gpt/config/arguments.py calls this with that place as `start`. Links are followed
    only where a `..` comes after them. Raises ValueError for what is no path."""
    if b"\0" in os.fsencode(path):  # which raises ValueError for what is no text
        raise ValueError("a path has no NUL byte")
    parts = (start / os.path.expanduser(path)).parts
    n = len(parts) - parts[::-1].index("..") if ".." in parts else 1
    return Path(os.path.realpath(os.path.join(*parts[:n])), *parts[n:])


def stored(path: str, root: Path = PROJECT_ROOT) -> str:
    """A path as files record it and jobs are known by it: relative to the project if it is inside, else absolute."""
    place = absolute(path, root)
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place)


def typed(path: Path) -> str:
    """A path as one types it in the current folder: relative to that if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def shareable(place: str | Path) -> str:
    """A path for a text that others read: relative to the project if it is inside, else its name alone, so that it does
    not say whose home it is in."""
    path = stored(str(place))
    return Path(path).name if Path(path).is_absolute() else path


def elsewhere(place: Path) -> str:
    """For an error about a place where nothing is: the other place where the name does exist, `did you mean ...?`, or
    nothing. A name may be meant relative to where the user is, or to the project."""
    here = Path.cwd()
    for start, other in ((here, PROJECT_ROOT), (PROJECT_ROOT, here)):
        if start != other and place.is_relative_to(start):
            meant = other / place.relative_to(start)
            if exists(meant) and meant != place:
                return f"did you mean {meant}?"
    return ""


def exists(path: Path) -> bool:
    """Whether something is there, or matches a pattern such as books/*.txt."""
    try:
        return os.path.lexists(path) or any(glob.iglob(glob_pattern(path), recursive=True))
    except (OSError, ValueError):
        return False


def glob_pattern(path: Path) -> str:
    """A pattern for glob, in which folders that exist are no patterns, whatever characters their names have."""
    folder = next(parent for parent in path.parents if parent.is_dir() or parent == parent.parent)
    return os.path.join(glob.escape(str(folder)), path.relative_to(folder))
