"""Decides how torch's threads wait for each other, and says when other processes keep them from the processor.

The first part must happen before torch is loaded, so nothing here imports it at the top.
"""

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

# Turns for which a thread of libgomp, which torch's builds for Linux are linked with, waits at the end of a parallel
# loop before it sleeps. libgomp's own 300,000 take milliseconds from whoever has work to do when another process is
# busy; 1,000 are as fast on a quiet machine and 1.7 to eight times as fast on a busy one: experiments/speed/README.md.
SPIN_COUNT = 1_000
# The loops of one token take a fraction of a millisecond, and a thread that sleeps between them is late: 20,000 are
# 1.1 to 1.9 times as fast then, and several times as slow beside a busy process: experiments/generation/README.md.
SPIN_COUNT_OF_TOKENS = 20_000
QUIET = 0.25  # processes that have computed or waited for it, in the mean of the last minute, where a machine is quiet
OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # of these the user's are left alone
STARVED = 0.5  # seconds of waiting for a processor, to each one of computing
LEAST = 20.0  # seconds of computing, before anything is said


def prepare(are_tokens_made: bool) -> None:
    """Sets how long threads spin, unless the user has. libgomp reads it when torch is loaded, and never again.

    are_tokens_made: whether most of the work is to compute one token after the other.
    """
    if not any(name in os.environ for name in OWN):
        spin_count = SPIN_COUNT_OF_TOKENS if are_tokens_made and is_quiet() else SPIN_COUNT
        os.environ["GOMP_SPINCOUNT"] = str(spin_count)


def is_quiet() -> bool:
    """Whether nothing else is computing on this machine; False where the system does not say."""
    try:
        return os.getloadavg()[0] < QUIET
    except (AttributeError, OSError):
        return False


class Starvation:
    """Says once in a run that its threads wait for processors that others have."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = used_and_waited()

    def check(self) -> None:
        """Looks at the time since the last look at which there was something to say, or since the start."""
        now = used_and_waited()
        if self._before is None or now is None:
            return
        used, waited = (new - old for new, old in zip(now, self._before, strict=True))
        if used + waited < LEAST:
            return
        self._before = now
        if waited > STARVED * used:
            import torch

            remedy = "; fewer threads (threads=1) may be faster" if torch.get_num_threads() > 1 else ""
            log.warning(f"other processes are using the processor: this run waited {waited:.0f} s for {used:.0f} s of "
                        f"computing{remedy}")  # fmt: skip
            self._before = None


def used_and_waited() -> tuple[float, float] | None:
    """Seconds that the threads of this process had on processors, and that they were ready and had none. None where
    the system does not count them."""
    used = waited = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                run, wait, _ = map(int, (task / "schedstat").read_text().split())
                used, waited = used + run, waited + wait
    except (OSError, ValueError):
        return None
    return (used / 1e9, waited / 1e9) if used else None
