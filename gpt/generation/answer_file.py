"""Keeps answers in a JSONL file, a line each, and goes on after the last whole one."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from gpt.errors import ENVIRONMENT, IN_USE, UserError
from gpt.files import atomic, jsonl
from gpt.terminal.console import count, escape

QUESTION = ("prompt", "input", "sample")  # the first keys of a line: what it answers
TEXT, SETTINGS = "text", "settings"
ANOTHER = "name another output"


class AnswerFile:
    """The answers in a file that is open and locked. A line is {"prompt", "input", "sample", "text", ..., "settings"},
    and all lines have the same settings."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Reads what is there. Raises UserError (2) for a file that has something else in it."""
        self.path, self._file = path, file
        file.seek(0)
        *lines, self._torn = file.read().split(b"\n")
        self._end = file.tell() - len(self._torn)  # where the whole lines end
        self.rows = [self._read(number, line) for number, line in enumerate(lines, 1)]

    @property
    def settings(self) -> dict[str, Any] | None:
        """Of the answers that are there; None where there are none."""
        return self.rows[0][SETTINGS] if self.rows else None

    def go_on(self, questions: Sequence[dict[str, Any]], settings: dict[str, Any]) -> int:
        """How many answers are there already, the first ones of `questions`, which are {"prompt", "input", "sample"}.
        Removes a line that was cut off. Raises UserError (2) for answers to others, or with other settings."""
        if len(self.rows) > len(questions):
            what = f"has {count(len(self.rows), 'answer')}, and {len(questions)} are to be given"
            raise UserError(what, str(self.path), ANOTHER)
        for number, (row, question) in enumerate(zip(self.rows, questions, strict=False), 1):
            self._check_settings(number, row[SETTINGS], settings)
            if different := [key for key in QUESTION if row[key] != question[key]]:
                key = different[0]
                what = f"has another {key}, {shortened(row[key])} and not {shortened(question[key])}"
                raise UserError(what, f"{self.path}:{number}", ANOTHER)
        if self._torn:
            following = questions[len(self.rows)] if len(self.rows) < len(questions) else None
            if not following or not is_beginning(self._torn, following):
                raise self._not_an_answer(len(self.rows) + 1)
            self._file.truncate(self._end)
            self._torn = b""
        return len(self.rows)

    def append(self, question: dict[str, Any], answer: dict[str, Any], settings: dict[str, Any]) -> None:
        """Writes a line, whole or not at all; a process that is killed loses none before it. Raises UserError (5)."""
        row = {**question, **answer, SETTINGS: settings}
        try:
            jsonl.append_whole(self._file, jsonl.as_line(row))
        except OSError as error:
            done = f"its {count(len(self.rows), 'answer')} {'is' if len(self.rows) == 1 else 'are'} whole"
            what = f"answer not written: {atomic.why_refused(error)}"
            raise UserError(what, str(self.path), f"{done}, and the same command goes on", ENVIRONMENT) from error
        self.rows.append(row)

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if [*row][: len(QUESTION)] == list(QUESTION) and isinstance(row[TEXT], str) and {**row[SETTINGS]}:
                return row
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise self._not_an_answer(number)

    def _not_an_answer(self, number: int) -> UserError:
        return UserError("not an answer that generate.py has written", f"{self.path}:{number}", ANOTHER)

    def _check_settings(self, number: int, there: dict[str, Any], now: dict[str, Any]) -> None:
        for key in {**there, **now}:
            if there.get(key) != now.get(key):
                what = f"has answers with {key} {shortened(there.get(key))}, and not {shortened(now.get(key))}"
                raise UserError(what, f"{self.path}:{number}", f"{ANOTHER}, or the settings of these")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[AnswerFile]:
    """A file that nobody else writes to during the `with` block; it is made if it is not there, and no empty one
    stays. Raises UserError (5) where nothing can be written, (6) where somebody else does, (2) for what is no file."""
    is_new = not os.path.lexists(path)
    if not is_new and not path.is_file():
        raise UserError("not a file", str(path), ANOTHER)
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115, open as long as the lock is held
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", str(path), ANOTHER, ENVIRONMENT) from error
    with file:
        if not lock_descriptor(file.fileno(), blocking=False):
            raise UserError("in use by another process", str(path), f"wait for it, or {ANOTHER}", IN_USE)
        try:
            yield AnswerFile(path, file)
        finally:
            if is_new and file.seek(0, os.SEEK_END) == 0:
                with contextlib.suppress(OSError):
                    path.unlink()


def check(path: Path) -> None:
    """Raises UserError for a place that `opened` refuses, before a model is loaded for nothing."""
    with opened(path):
        pass


def is_beginning(torn: bytes, question: dict[str, Any]) -> bool:
    """Whether a line that was cut off is one that answers this question, and so of this program."""
    head = jsonl.as_line({**question, TEXT: ""}).encode().removesuffix(b'"}\n')
    return torn.startswith(head) or head.startswith(torn)


def shortened(value: object) -> str:
    """A value in an error's line: a long text would hide the rest."""
    text = escape(str("none" if value is None else value))
    return text if len(text) <= 60 else f"{text[:57]}..."
