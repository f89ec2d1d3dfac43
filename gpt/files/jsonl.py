"""Appends rows to a JSONL file and reads them: they outlive a killed process and wait for a full disk.

JSON has no NaN and no infinity: they are written as the strings that W&B uses for them, and read back as numbers.
"""

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from gpt.files import atomic

log = logging.getLogger(__name__)

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
TEXTS = {"prompt", "text"}  # a model may well write "NaN"


class RowFile:
    """A file to which rows are appended. When it cannot be written that is one warning, and the rows wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""  # lines that are not in the file yet
        self._warned = False

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Appends all rows that wait and then `rows`, or nothing at all when the disk is full."""
        self._waiting += "".join(map(as_line, rows))
        if not self._waiting:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                append_whole(file, self._waiting)
            self._waiting = ""
        except OSError as error:
            if not self._warned:
                log.warning(f"{self.path} cannot be written ({error.strerror}); training continues, its rows wait")
            self._warned = True

    def drop_after(self, step: int) -> list[dict[str, Any]]:
        """Leaves only the rows up to `step` and returns them. The file is replaced whole or not at all."""
        if not self.path.is_file():
            return []
        kept = [row for row in read_rows(self.path) if isinstance(row.get("step"), int) and row["step"] <= step]
        try:
            atomic.write(self.path, "".join(map(as_line, kept)))
        except OSError as error:
            log.warning(f"{self.path} still has rows after step {step} ({error.strerror}); training continues")
        return kept


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when there is no file. A torn last line, of a killed run, is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            for key in row.keys() - TEXTS:
                if isinstance(row[key], str):
                    row[key] = NON_FINITE.get(row[key], row[key])
            rows.append(row)
        except (ValueError, AttributeError, RecursionError):
            if number < len(lines):
                log.warning(f"{path}:{number}: not a JSON object, left out")
    return rows


def append_whole(file: BinaryIO, text: str) -> None:
    """Appends a text to a file that was opened for that, without a buffer; or nothing at all when the disk is full.
    Raises OSError."""
    size = os.fstat(file.fileno()).st_size
    data = memoryview(text.encode())
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def as_line(row: dict[str, Any]) -> str:
    """A row as a line of the file: ASCII, and so without control characters, whatever its texts have."""
    values = dict(row)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = json.dumps(value)  # "NaN", "Infinity" or "-Infinity"
    return json.dumps(values, allow_nan=False) + "\n"
