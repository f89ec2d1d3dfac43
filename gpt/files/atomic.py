"""Writes files atomically: whole or not at all, whatever happens to the process or the machine."""

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk. Windows opens no directory, and waits only
    for a file that could be written to."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to be written in the `with` block, which replaces `path` at its end. After an exception the old file
    is still there and no new one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write(path: Path, text: str) -> None:
    """Writes or replaces a file. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def why_refused(error: Exception) -> str:
    """What the disk says, in words; safetensors puts the number of the error into a text."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        return "disk full"
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
