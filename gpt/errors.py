"""Defines the errors that end a process without a traceback: a user's mistake or surroundings, and a signal."""

import signal
from pathlib import Path

USAGE, CHECKPOINT, NUMERICAL, ENVIRONMENT, IN_USE = 2, 3, 4, 5, 6


def one_line(what: object, longest: int | None = None) -> str:
    """A text, or what an exception says, else its type, on one line of at most so many characters."""
    text = str(what).strip() or type(what).__name__
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:longest]


class UserError(Exception):
    """What went wrong, where, and what to do about it; `code` is the exit code of the process.

    Codes: 2 usage, configuration or data; 3 checkpoint unusable; 4 numerical stop; 5 environment (disk, device,
    network); 6 run directory in use.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "", code: int = USAGE) -> None:
        super().__init__(what, where, remedy, code)  # all four, so that the error survives pickling by a launcher
        self.what, self.where, self.remedy, self.code = what, where, remedy, code

    def __str__(self) -> str:
        return self.what + (f" ({self.where})" if self.where else "") + (f"; {self.remedy}" if self.remedy else "")


def exit_code(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    if isinstance(error, OSError) and error.filename:  # while a directory or a file of the run is made
        return ENVIRONMENT
    if isinstance(error, UserError | Interrupted):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def unusable(path: Path, reason: str) -> UserError:
    """The error for a checkpoint or a file of weights that cannot be used."""
    return UserError(f"{path.name} damaged ({reason})", str(path.parent), code=CHECKPOINT)


class Interrupted(KeyboardInterrupt):
    """The process got a signal to end. `code` is the shell's for that signal: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int, what: str = "") -> None:
        super().__init__(number, what)
        self.code = 128 + number
        self.what = what

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.code - 128).name}" + (f": {self.what}" if self.what else "")
