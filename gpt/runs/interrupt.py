"""What SIGINT (Ctrl-C) and SIGTERM (a cluster's notice) do to a process.

Where nothing can be lost they end it at once, by raising Interrupted. Inside `deferred`, which is where a run trains,
the first one only sets a flag that the run asks for between micro-batches; the second one exits at once.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gpt.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"  # which the progress bar hides


class Stop:
    """Whether a run has been asked to stop: by a signal, or because `asked` says so."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.signal: int | None = None
        self._asked = asked

    def __call__(self) -> bool:
        return self.signal is not None or self._asked()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os._exit(128 + number)  # no cleaning up: that may be what hangs
        self.signal = number


def end_at_once() -> None:
    """From now on a signal raises Interrupted wherever the main thread is."""
    for number in SIGNALS:
        signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def deferred(asked: Callable[[], bool] = lambda: False) -> Iterator[Stop]:
    """Until the end of the `with` block a signal waits to be asked for. In another thread than the main one, where
    Python allows no handlers, only `asked` counts."""
    stop = Stop(asked)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
