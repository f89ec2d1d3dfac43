"""Writes files that are on the disk whole or not at all, whatever happens to the process or the machine."""

import contextlib
import errno
import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, text: str) -> None:
    """Writes or replaces a file. Raises OSError, and then the old file is still there and no temporary one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def why_refused(error: Exception) -> str:
    """What the disk says, in words; safetensors puts the number of the error into a text."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        return "disk full"
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
