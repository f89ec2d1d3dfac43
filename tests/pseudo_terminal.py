"""Runs a function or a command in a terminal of its own, as a person has it: with a width, with keys that are pressed,
and with a window that may be closed."""

import contextlib
import fcntl
import gc
import os
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable

from tracing import end_with

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
# Seconds before a signal. Between readline's prompt and its wait for keys Python would see it at the next key only
# (readline_until_enter_or_signal in CPython's Modules/readline.c).
UNTIL_WAITING = 0.5
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A child of this process runs `function` in a new pseudo-terminal, which is the controlling one of its session."""

    def __init__(self, function: Callable[[], object], columns: int = 80) -> None:
        self.keyboard, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.received = b""
        self._seen = 0  # characters of `text` that `wait_for` has returned
        gc.freeze()
        self.pid = os.fork()
        if not self.pid:
            end_with(lambda: in_terminal(inner, self.keyboard, function))
        gc.unfreeze()
        os.close(inner)

    @property
    def text(self) -> str:
        """All that has been received, without what moves the cursor."""
        return ESCAPES.sub("", self.received.decode(errors="replace")).replace("\r", "")

    def press(self, keys: str) -> None:
        """What a person types."""
        if CTRL_C in keys:
            time.sleep(UNTIL_WAITING)
        os.write(self.keyboard, keys.encode())

    def send(self, number: signal.Signals) -> None:
        """A signal from elsewhere."""
        time.sleep(UNTIL_WAITING)
        os.kill(self.pid, number)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What has been received since the last call, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while (at := self.text.find(text, self._seen)) < 0:
            assert self._receive(deadline), f"no {text!r} in {self.text[self._seen :]!r}"
        begin, self._seen = self._seen, at + len(text)
        return self.text[begin : self._seen]

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """The exit code, negative for a signal, and what has been received since the last call."""
        deadline = time.monotonic() + seconds
        while self._receive(deadline):
            pass
        return self.wait(deadline - time.monotonic()), self.text[self._seen :]

    def wait(self, seconds: float = 60) -> int:
        """The exit code."""
        deadline = time.monotonic() + seconds
        while (waited := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, f"it has not ended: {self.text[self._seen :]!r}"
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(waited[1])

    def close(self) -> None:
        """Closes the window."""
        os.close(self.keyboard)

    def _receive(self, deadline: float) -> bool:
        if select.select([self.keyboard], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with contextlib.suppress(OSError):  # Linux's way to say that the other side has closed
                data = os.read(self.keyboard, 65536)
                self.received += data
                return bool(data)
        return False


def in_terminal(inner: int, keyboard: int, function: Callable[[], object]) -> None:
    """What the child does."""
    os.close(keyboard)
    os.login_tty(inner)
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    os.environ |= {"TERM": "xterm", "INPUTRC": os.devnull}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup, or a shell in the background, has made of them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    function()
