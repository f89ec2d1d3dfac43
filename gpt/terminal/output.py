"""Keeps a process alive whose stdout or stderr takes no more, and tells those whose result is lost."""

import contextlib
import io
import os
import sys
from typing import Any, NoReturn, TextIO

from gpt.errors import ENVIRONMENT, UserError


class _Output(io.FileIO):
    """File descriptor 1 or 2. When its reader has gone (`| head`) or its disk is full, what follows is dropped.

    refused: why, unless it is the reader that has gone, who has what he wants.
    """

    refused: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = None if isinstance(error, BrokenPipeError) else error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # the descriptor itself, for libraries that write past Python
            os.close(nowhere)
            return len(data)


def check_output() -> None:
    """Raises UserError (5) if stdout has refused something, for those whose result it is."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Output) and raw.refused:
        raise UserError("stdout is not written", str(raw.refused.strerror), code=ENVIRONMENT)


def survive_closed_output() -> None:
    """A closed or limited stdout or stderr never stops a run: nothing raises, not even at interpreter exit.

    Characters that the encoding lacks (PYTHONIOENCODING=ascii) are shown as escapes. Streams that are not the
    process's own (a test's capture) are left alone.
    """
    sys.stdout = _surviving(sys.stdout, 1)
    sys.stderr = _surviving(sys.stderr, 2)


def _surviving(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # started with the descriptor closed, as by `>&-`
        return open(os.devnull, "w", encoding="utf-8")
    binary = getattr(stream, "buffer", None)
    raw = getattr(binary, "raw", binary)  # with PYTHONUNBUFFERED there is no buffer around the raw file
    is_own = isinstance(raw, io.FileIO) and raw.fileno() == descriptor and not isinstance(raw, _Output)
    if not is_own:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    output = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
    return io.TextIOWrapper(output, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def flush_and_exit(code: int, at_once: bool = False) -> NoReturn:
    """Leaves the process with exit code `code`; `at_once`: without waiting for threads, which may be stuck."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    (os._exit if at_once else sys.exit)(code)
