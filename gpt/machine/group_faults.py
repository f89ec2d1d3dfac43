"""Has what ended a process group said once, in one line, by whoever knows it best.

A rank that fails leaves its error in the store that all ranks are connected to. The others, whose exchange breaks off,
look there for the cause; the first rank prints it. Where the first rank itself is gone, the first one to notice does.
"""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.errors import ENVIRONMENT, Interrupted, UserError
from gpt.machine import rank_environment

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

CAUSE, SAID, PRESENT, ABOUT = "cause", "said", "present", "about"  # keys of the store; the last two for each rank
PATIENCE = 2.0  # seconds in which the cause of a broken exchange is looked for
TAKEN = 60.0  # seconds in which the first rank says what another one has left; it may have to close W&B before
BLOCKED = 2.0  # the same where it may be waiting inside of torch, which only the end of the other's connection ends
BEFORE = 5.0  # seconds in which torchrun ends the other ranks when one of them has failed before they met


class GroupFault(UserError):
    """The exchange with other ranks has failed. `rank` is the one whose fault it is; `is_said` elsewhere or here."""

    def __init__(self, what: str, where: str = "", remedy: str = "", code: int = ENVIRONMENT, rank: int = -1) -> None:
        super().__init__(what, where, remedy, code)
        self.rank = rank


@dataclass
class Faults:
    """The store as one rank sees it, and where all ranks run."""

    store: "Store"
    rank: int
    count: int
    taken: float = TAKEN

    def introduce(self) -> None:
        """Tells the others where this rank runs."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}
        self.store.set(f"{ABOUT}/{self.rank}", json.dumps(about))

    def about(self, rank: int) -> dict[str, Any]:
        key = f"{ABOUT}/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else {}

    def leave(self, code: int, message: str) -> bool:
        """Leaves an error for the others; False when another one is there already."""
        own = json.dumps({"rank": self.rank, "code": code, "message": message})
        return self.store.compare_set(CAUSE, "", own) == own.encode()

    def may_speak(self) -> bool:
        """Whether nobody has said yet what has ended the group; this rank does now."""
        own = str(self.rank)
        return self.store.compare_set(SAID, "", own) == own.encode()

    def cause(self) -> GroupFault | None:
        """The error that a rank has left."""
        if not self.store.check([CAUSE]):
            return None
        found = json.loads(self.store.get(CAUSE))
        return GroupFault(f"rank {found['rank']}: {found['message']}", code=found["code"], rank=found["rank"])

    def explain(self, what: str) -> GroupFault:
        """Why an exchange has failed: the error that a rank has left, else the rank that has gone or does not answer. A
        rank of this machine that was silent for too long is ended."""
        try:
            return self._explain(what)
        except RuntimeError:  # the store is gone; without torchrun the first rank has kept it
            return GroupFault("rank 0 has ended, or torchrun", rank=0)

    def _explain(self, what: str) -> GroupFault:
        self.store.set(f"{PRESENT}/{self.rank}", "yes")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if cause := self.cause():
                return cause
            time.sleep(0.05)
        absent = [rank for rank in range(self.count) if not self.store.check([f"{PRESENT}/{rank}"])]
        states = {rank: self.state(rank) for rank in absent}
        gone = [rank for rank in absent if states[rank] == "has ended"] or [r for r in absent if states[r]] or absent
        if not gone:
            return GroupFault(f"the ranks cannot exchange anything: {what}")
        for rank in gone:
            if states[rank] == "is stopped":
                os.kill(self.about(rank)["pid"], signal.SIGKILL)  # or torchrun waits 30 s before it does
        about = self.about(gone[0])
        others = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        where = f"pid {about['pid']} on {about['host']}" if about else ""
        return GroupFault(f"rank {gone[0]}{others} {states[gone[0]] or 'does not answer'}", where, rank=gone[0])

    def state(self, rank: int) -> str:
        """What has become of a rank of this machine, in words; nothing for one that lives or runs elsewhere."""
        about = self.about(rank)
        if about.get("host") != socket.gethostname():
            return ""
        try:
            fields = Path(f"/proc/{about['pid']}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return "has ended" if Path("/proc/self/stat").exists() else ""
        if fields[0] in "ZX" or int(fields[1]) != about["parent"]:  # another process has its number by now
            return "has ended"
        return "is stopped" if fields[0] in "Tt" else ""


_faults: Faults | None = None  # those of the group that this process is in


def join(faults: Faults) -> None:
    """From now on errors of this process are those of a rank of this group."""
    global _faults
    _faults = faults
    faults.introduce()


def joined() -> bool:
    """Whether this process is in a group."""
    return _faults is not None


def settle(error: BaseException, code: int, message: str) -> tuple[int, str]:
    """The exit code of a process that `error` ends, and what it is to print: nothing where another rank says it."""
    place = rank_environment.read()
    if place.count == 1:
        return code, message
    if _faults is None:
        if not place.is_first and not isinstance(error, Interrupted):
            time.sleep(BEFORE)  # the first rank most probably has the same error, and torchrun ends this one with it
        return code, "" if isinstance(error, Interrupted) and not place.is_first else _by(place.rank, message)
    try:
        return _settle(_faults, error, code, message)
    except RuntimeError:  # the store has gone with whoever kept it: torchrun, or the first rank that has said all
        speaks = place.is_first or (place.rank == 1 and _fault_behind(error) is not None)
        return code, message if speaks else ""


def _settle(faults: Faults, error: BaseException, code: int, message: str) -> tuple[int, str]:
    fault = _fault_behind(error)
    if isinstance(error, Interrupted) and not error.what and fault is None:
        fault = _while_starting(faults)  # torchrun interrupts all others when a rank has failed
    if fault is not None:
        code, message = fault.code, str(fault)
    is_signal = isinstance(error, Interrupted) and fault is None
    if faults.rank == 0:
        is_alone = is_signal and any(not faults.about(rank) for rank in range(faults.count))
        faults.leave(code, message)
        return code, message if not is_alone and faults.may_speak() else ""  # torchrun says who has not come
    is_mine = not is_signal and faults.leave(code, message)
    is_gone = (fault is not None and fault.rank == 0) or not faults.about(0)
    # Also after a signal: when one rank ends, torchrun ends the others, and the first may be closing W&B.
    _wait(lambda: faults.store.check([SAID]), 0 if is_gone else faults.taken)
    if not is_mine or not faults.may_speak():
        return code, ""
    return code, message if fault else _by(faults.rank, message)


def _fault_behind(error: BaseException | None) -> GroupFault | None:
    """The fault that an error is, or that was being handled when it was raised."""
    while error is not None and not isinstance(error, GroupFault):
        error = error.__context__
    return error


def _while_starting(faults: Faults) -> GroupFault | None:
    """The fault of another rank because of which this one was interrupted, if that was the reason."""
    _wait(lambda: faults.cause() is not None, PATIENCE / 2)
    states = {rank: faults.state(rank) for rank in range(faults.count) if rank != faults.rank}
    ended = [rank for rank, state in states.items() if state == "has ended"]
    return faults.cause() or (faults.explain("interrupted") if ended else None)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


def _by(rank: int, message: str) -> str:
    return f"rank {rank}: {message}" if rank else message
