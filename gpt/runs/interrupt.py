"""Handles SIGINT (Ctrl-C) and SIGTERM (a cluster's notice).

Where nothing can be lost they end the process at once, by raising Interrupted. Inside `deferred`, which is where a run
trains, the first one only sets a flag that the run reads between micro-batches. The second one exits at once, wherever
the process is by then: what handles the first is not disturbed. Ranks that share a run stop together, at the same step.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gpt.errors import Interrupted
from gpt.machine.ranks import ALONE, Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
late: int | None = None  # the signal that came when a run had nothing left to stop: no other run begins after it
AGAIN = 5.0  # seconds in which the same signal may come twice to a rank: from a cluster, and from torchrun
AT_ONCE = 1.0  # seconds after a Ctrl-C that ended an answer in which another one ends the program
SHOW_CURSOR = b"\x1b[?25h"  # the progress bar hides it


class Stop:
    """Returns whether a run is to stop: after a signal to any of its ranks, or when `also` returns true in one."""

    def __init__(self, also: Callable[[], bool], ranks: Ranks = ALONE) -> None:
        self.received: int | None = None  # by this process
        self._time = 0.0
        self._also, self._ranks = also, ranks
        ranks.watch(self.wish)

    def __call__(self) -> bool:
        return self._ranks.wish(self.wish) != 0

    @property
    def signal(self) -> int | None:
        """The signal because of which the run is to stop."""
        number = self._ranks.wish(self.wish)
        return number if number in SIGNALS else None

    def wish(self) -> int:
        """Why this process would stop: the number of a signal, or 1; 0: it would not."""
        return self.received or int(self._also())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_repeated = self._ranks.count > 1 and time.monotonic() - self._time < AGAIN
        if self.received is not None and not is_repeated:
            _exit(number, frame)
        if self.received is None:
            self.received, self._time = number, time.monotonic()


class AnswerEnd:
    """Returns whether Ctrl-C has ended the answer that is being given: in a `with` block it ends nothing else, unless
    it is the second one within AT_ONCE. Other signals end the process as ever."""

    def __init__(self) -> None:
        self.came = False
        self._time = -math.inf

    def __call__(self) -> bool:
        return self.came

    def reset(self) -> None:
        """Says that the next answer begins."""
        self.came = False

    def __enter__(self) -> "AnswerEnd":
        self.reset()
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):  # after which the next signal exits at once
            signal.signal(signal.SIGINT, self._before)

    def follows(self) -> bool:
        """Whether a Ctrl-C that comes now is the second one; else it is the first one."""
        last, self._time = self._time, time.monotonic()
        return self._time - last < AT_ONCE

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.follows() or self.came:
            _raise(number, frame)
        self.came = True


def end_at_once() -> None:
    """From now on the first signal raises Interrupted wherever the main thread is. Called inside of the `try` that
    catches it."""
    for number in SIGNALS:
        signal.signal(number, _raise)


def end_without_raising() -> None:
    """From now on a signal exits at once, so that no line after a `try` is one where Interrupted is not caught."""
    for number in SIGNALS:
        signal.signal(number, _exit)


def _raise(number: int, frame: FrameType | None) -> None:
    end_without_raising()
    raise Interrupted(number)


def _exit(number: int, frame: FrameType | None) -> None:
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    os._exit(128 + number)  # no cleaning up: that may be what hangs


@contextmanager
def deferred(also: Callable[[], bool] = lambda: False, ranks: Ranks = ALONE) -> Iterator[Stop]:
    """Until the end of the `with` block a signal waits until the Stop is called; one that does not end the block with
    an exception is `late`. In another thread than the main one, where Python allows no handlers, only `also` counts."""
    global late
    stop = Stop(also, ranks)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            signal.signal(number, stop._receive)
        yield stop
        late = late or stop.received  # a run that has done its last step comes to its end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
