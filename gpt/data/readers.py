"""Reads CSV, JSON, JSON Lines and plain text strictly, gzipped or not, one row at a time.

Nothing is guessed or mended: what cannot be read as it stands is reported with its file and line, and counted if the
configuration says that such rows may be left out. Strict means RFC 4180 for CSV (lines may also end in a lone \\n) and
RFC 8259 for JSON: no NaN or Infinity, no white space but its own; nor a key twice in an object, of which json would
keep the last. Memory is bounded by the largest row, and a row by ROW_LIMIT.
"""

import codecs
import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data.text_files import ROW_LIMIT, BadLine, TextFile, open_text, shorten
from gpt.errors import UserError
from gpt.terminal.console import escape

PIECE = 64 << 10  # bytes of a JSON array that are read at once
TOKEN = 16  # characters; what may be cut in two, other than a string, is shorter: -Infinity, 1.5e+, \ud83d\ude00
SPACE = re.compile(r"[ \t\r\n]*")
_FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|[^",\r\n]*+)'
CSV_ROW = re.compile(rf"{_FIELD}(?:,{_FIELD})*+(?:\r?\n)?")


class Row(NamedTuple):
    """One row as it stands in its file: `line` is where it starts, counted from 1."""

    where: str
    line: int
    values: dict[str, Any]
    split: str | None = None  # the split that the publisher put it into, if any


class BadRows:
    """What happens to a row that cannot be used: "error" stops with a UserError, "skip" remembers it in `found`.

    `setting` is what a person sets to have such rows left out, if there is such a setting.
    """

    def __init__(self, policy: str, setting: str | None = "data.on_bad_row=skip") -> None:
        self.policy, self.setting = policy, setting
        self.found: list[str] = []

    def report(self, where: str, line: int, problem: str, can_skip: bool = True, cure: str = "correct it") -> None:
        if self.policy == "error" or not can_skip:
            remedy = cure + (f", or leave such rows out with {self.setting}" if can_skip and self.setting else "")
            raise UserError(f"{escape(where)}:{line}: {escape(problem)}", remedy=remedy)
        self.found.append(f"{escape(Path(where).name)}:{line}: {escape(problem)}")


def rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a CSV, JSON or JSON Lines file, told apart by name. Raises UserError for what is wrong with it."""
    names = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return json_rows(path, bad) if names and names[-1] in (".json", ".jsonl", ".ndjson") else _csv(path, bad)


def text(path: Path) -> str:
    """A text file, its line ends as \\n. Raises UserError when it is not UTF-8."""
    with open_text(path) as source:
        return source.read().replace("\r\n", "\n")


def _csv(path: Path, bad: BadRows) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than one long article
    header: list[str] | None = None
    n_rows, n_found = 0, len(bad.found)
    with open_text(path) as source:
        while True:
            try:
                row = source.row(multiline=True)
                problem, line, n_lines = _csv_problem(row), source.first, row.count("\n", 0, -1) + 1
            except BadLine as error:
                problem, line, n_lines = str(error), error.line, error.line - source.first + 1
            if problem:
                # Of a row that goes on in lines to come, where the next one starts cannot be known.
                is_whole = n_lines == 1 and source.quotes % 2 == 0
                bad.report(str(path), line, problem, can_skip=is_whole and header is not None)
                continue
            if not row:
                break
            if row in ("\n", "\r\n"):
                continue
            cells = next(csv.reader([row], strict=True))
            if header is None:
                header = _header(path, line, cells, bad)
                continue
            n_rows += 1
            if len(cells) != len(header):
                fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
                bad.report(str(path), line, f"{fields}, the header has {len(header)}")
                continue
            yield Row(str(path), line, dict(zip(header, cells, strict=True)))
    if header is None:
        raise UserError(f"{escape(str(path))} is empty", remedy="a CSV file with a header line is needed")
    if not n_rows and len(bad.found) == n_found:
        columns = ", ".join(header)
        raise UserError(
            f"{escape(str(path))} has a header line and no rows", f"columns {escape(shorten(columns, 400))}"
        )


def _csv_problem(row: str) -> str | None:
    """What RFC 4180 does not allow. The csv module takes a quote in a field that has none around it, which is what a
    damaged quote leaves behind: fields, and then rows, that begin and end elsewhere."""
    end = CSV_ROW.match(row).end()
    if end == len(row):
        return None
    if row[end] == "\r":
        return "a carriage return inside a field without quotes"
    if row[end] != '"':
        return "text after the closing quote of a field"
    is_opening = end == 0 or row[end - 1] == ","
    return "a quoted field is never closed" if is_opening else "a quote inside a field without quotes"


def _header(path: Path, line: int, cells: list[str], bad: BadRows) -> list[str]:
    seen: set[str] = set()
    for cell in cells:
        if cell.strip().casefold() in seen:
            bad.report(str(path), line, f"column {shorten(cell)!r} occurs twice in the header", can_skip=False)
        seen.add(cell.strip().casefold())
    return cells


def json_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """The objects of JSON Lines, or of one JSON array, whatever the file is called. Raises UserError."""
    is_empty, n_found = True, len(bad.found)
    read = _array if _is_array(path) else _json_lines
    with open_text(path) as source:
        for line, value, problem in read(path, source, bad):
            is_empty = False
            if not problem and not isinstance(value, dict):
                problem = f"{_kind(value)} where an object {{...}} is needed"
            problem = problem or next((p for key, cell in value.items() if (p := _unwritable(key, cell))), None)
            if problem:
                bad.report(str(path), line, problem)
                continue
            yield Row(str(path), line, value)
    if is_empty and len(bad.found) == n_found:
        raise UserError(f"{escape(str(path))} is empty", remedy="a JSON array or one JSON object a line is needed")


def _is_array(path: Path) -> bool:
    """Whether the first character of a file, white space aside, is a [."""
    with open_text(path) as source:
        start = source.file.read(PIECE).removeprefix(codecs.BOM_UTF8)
        while start and not start.strip(b" \t\r\n"):
            start = source.file.read(PIECE)
    return start.lstrip(b" \t\r\n").startswith(b"[")


class _Decoder(json.JSONDecoder):
    """Decodes a JSON value. What json would drop or take without a word is in `problem` afterwards: a key that occurs
    twice, NaN and Infinity, numbers that Python cannot hold."""

    def __init__(self) -> None:
        super().__init__(
            object_pairs_hook=self._object, parse_int=self._int, parse_float=self._float, parse_constant=self._constant
        )
        self.problem: str | None = None

    def raw_decode(self, content: str, idx: int = 0) -> tuple[Any, int]:
        self.problem = None
        return super().raw_decode(content, idx)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
            self.problem = f"key {shorten(repeated)!a} occurs twice"
        return values

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError as error:
            self.problem = f"invalid JSON ({str(error).split(' for ')[0]})"
            return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else self._constant(shorten(digits))

    def _constant(self, name: str) -> float:
        self.problem = f"invalid JSON ({name} is not a number that it can hold)"
        return math.nan


def _json_lines(path: Path, source: TextFile, bad: BadRows) -> Iterator[tuple[int, Any, str | None]]:
    """(line, value, problem) of each line that is not blank."""
    decoder = _Decoder()
    while True:
        try:
            row = source.row()
            content = row.rstrip(" \t\r\n")
            value = decoder.decode(content) if content else None
        except BadLine as error:
            bad.report(str(path), error.line, str(error))
        except (json.JSONDecodeError, RecursionError) as error:
            bad.report(str(path), source.first, _json_problem(error, getattr(error, "colno", 0)))
        else:
            if content:
                yield source.first, value, decoder.problem
            if not row:
                return


class _Window:
    """A part of a file of JSON, read up to `at`. It moves along the file and grows only for a value that is longer."""

    def __init__(self, source: TextFile) -> None:
        self.source, self.decoder = source, _Decoder()
        self.content, self.at = "", 0
        self.line = self.column = 1  # of the character `at`

    def move(self, to: int) -> None:
        lines = self.content.count("\n", self.at, to)
        self.line += lines
        self.column = to - self.content.rfind("\n", self.at, to) if lines else self.column + to - self.at
        self.at = to

    def more(self) -> bool:
        """Reads on, at least as much as is kept: what `at` has not passed. False at the end of the file."""
        new = self.source.read(max(PIECE, len(self.content) - self.at))
        if new:
            self.content, self.at = self.content[self.at :] + new, 0
        return bool(new)

    def peek(self) -> str:
        """Moves past white space. The next character, "" at the end of the file."""
        while True:
            self.move(SPACE.match(self.content, self.at).end())
            if self.at < len(self.content) or not self.more():
                return self.content[self.at : self.at + 1]

    def value(self) -> Any:
        """Decodes a value and moves past it. Raises RecursionError, and JSONDecodeError after moving to the error."""
        while True:
            error = None
            try:
                value, end = self.decoder.raw_decode(self.content, self.at)
            except json.JSONDecodeError as caught:
                value, end, error = None, caught.pos, caught
            # What is found close to the end of the window, or a quote never closed, may change with what is read next.
            is_sure = end + TOKEN < len(self.content) and not (error and error.msg.startswith("Unterminated string"))
            if not is_sure and len(self.content) - self.at > ROW_LIMIT:
                self.source.refuse_long_row(self.line)
            if is_sure or not self.more():
                break
        self.move(end)
        if error:
            raise error
        return value


def _array(path: Path, source: TextFile, bad: BadRows) -> Iterator[tuple[int, Any, str | None]]:
    """(line, value, problem) of each element; nothing after a syntax error can be trusted, so that is fatal."""
    window = _Window(source)

    def fail(problem: str) -> None:
        bad.report(str(path), window.line, problem, can_skip=False)

    window.peek()
    window.move(window.at + 1)  # past the [
    more = window.peek() != "]"
    while more:
        line = window.line
        try:
            value = window.value()
        except (json.JSONDecodeError, RecursionError) as error:
            fail(_json_problem(error, window.column))
        yield line, value, window.decoder.problem
        more = window.peek() == ","
        if more:
            window.move(window.at + 1)
            window.peek()
    if window.peek() != "]":
        fail("invalid JSON (',' or ']' expected)")
    window.move(window.at + 1)
    if window.peek():
        fail("invalid JSON (text after the end of the array)")


def _json_problem(error: Exception, column: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg} at column {column})"
    return "invalid JSON (nested too deeply)"


def _unwritable(key: str, cell: Any) -> str | None:
    """Why a value cannot be tokenized and written: JSON can spell what UTF-8 text cannot hold."""
    for part in (key, cell):
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                return f"{shorten(key)!a}: lone surrogate \\u{ord(part[error.start]):04x}"
        if isinstance(part, str) and "\0" in part:
            return f"{shorten(key)!a}: NUL character"
    return None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
