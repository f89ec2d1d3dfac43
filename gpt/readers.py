"""Strict reading of CSV, JSON, JSON Lines and plain text, gzipped or not, one row at a time.

Nothing is guessed or mended: what cannot be read as it stands is reported with its file and line, and counted if the
configuration says that such rows may be left out.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt.console import escape
from gpt.errors import ENVIRONMENT, UserError

CSV_PROBLEMS = {  # the csv module's words -> ours
    "unexpected end of data": "a quoted field is never closed",
    "',' expected after '\"'": "text after the closing quote of a field",
    "new-line character seen in unquoted field": "a carriage return inside a field without quotes",
}
SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """One row as it stands in its file: `line` is where it starts, counted from 1."""

    where: str
    line: int
    values: dict[str, Any]
    split: str | None = None  # the split that the publisher put it into, if any


class BadRows:
    """What happens to a row that cannot be used: "error" stops with a UserError, "skip" remembers it in `found`."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.found: list[str] = []

    def report(self, where: str, line: int, problem: str, can_skip: bool = True, cure: str = "correct it") -> None:
        if self.policy == "error" or not can_skip:
            remedy = cure + (", or leave such rows out with data.on_bad_row=skip" if can_skip else "")
            raise UserError(f"{escape(where)}:{line}: {escape(problem)}", remedy=remedy)
        self.found.append(f"{escape(Path(where).name)}:{line}: {escape(problem)}")


class _BadLine(Exception):
    """A line that is no text."""


class _Lines:
    """The lines of a file as text, with their line ends. Raises _BadLine for a line that is not UTF-8 or has a NUL;
    iterating may go on after that."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.number = 0  # of the line that was read last
        self.offset = 0  # of the next line's first byte; in a gzipped file, after decompression
        self.quotes = 0  # seen since this was last set to 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        start, raw = self.offset, next(self.file)
        self.number += 1
        self.offset += len(raw)
        self.quotes += raw.count(b'"')
        if self.number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:2]:
                raise UserError(f"{self.path} is UTF-16", remedy="save it as UTF-8")
            if raw.startswith(codecs.BOM_UTF8):
                raw, start = raw[3:], start + 3
        if b"\0" in raw:
            raise _BadLine(f"NUL character at byte {start + raw.index(0)} of the file")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _BadLine(f"not UTF-8 at byte {start + error.start} of the file: 0x{raw[error.start]:02x}") from None


def rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a CSV, JSON or JSON Lines file, told apart by name. Raises UserError for what is wrong with it."""
    names = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return _json(path, bad) if names and names[-1] in (".json", ".jsonl", ".ndjson") else _csv(path, bad)


def text(path: Path) -> str:
    """A text file, its line ends as \\n. Raises UserError when it is not UTF-8."""
    with _open(path) as lines:
        return _all_text(path, lines).replace("\r\n", "\n")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Lines]:
    """Errors of the file system and of decompression become UserErrors, also while the lines are being read."""
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open(path, "rb"))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file)))
            yield _Lines(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}", remedy="get the file again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}", error.strerror or str(error), code=ENVIRONMENT) from error


def _csv(path: Path, bad: BadRows) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than one long article
    header: list[str] | None = None
    n_rows = 0
    with _open(path) as lines:
        reader = csv.reader(lines, strict=True)
        while True:
            line, lines.quotes = lines.number + 1, 0
            try:
                cells = next(reader)
            except StopIteration:
                break
            except (csv.Error, _BadLine) as error:
                problem = next((ours for theirs, ours in CSV_PROBLEMS.items() if theirs in str(error)), str(error))
                # An odd quote: the row goes on in lines to come, and where the next row starts cannot be known.
                is_whole = line == lines.number and lines.quotes % 2 == 0
                bad.report(str(path), lines.number if isinstance(error, _BadLine) else line, problem,
                           can_skip=is_whole and header is not None)  # fmt: skip
                continue
            if not cells:  # a blank line
                continue
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
        raise UserError(f"{path} is empty", remedy="a CSV file with a header line is needed")
    if not n_rows and not bad.found:
        raise UserError(f"{path} has a header line and no rows", f"columns {_listed(header)}")


def _header(path: Path, line: int, cells: list[str], bad: BadRows) -> list[str]:
    seen: set[str] = set()
    for cell in cells:
        if cell.strip().casefold() in seen:
            bad.report(str(path), line, f"column {cell!r} occurs twice in the header", can_skip=False)
        seen.add(cell.strip().casefold())
    return cells


def _json(path: Path, bad: BadRows) -> Iterator[Row]:
    """JSON Lines, or one JSON array of objects."""
    is_empty = True
    with _open(path) as lines:
        for line, value in _values(path, lines, bad):
            is_empty = False
            if not isinstance(value, dict):
                bad.report(str(path), line, f"{_kind(value)} where an object {{...}} is needed")
                continue
            problem = next((p for key, cell in value.items() if (p := _unwritable(key, cell))), None)
            if problem:
                bad.report(str(path), line, problem)
                continue
            yield Row(str(path), line, value)
    if is_empty and not bad.found:
        raise UserError(f"{path} is empty", remedy="a JSON array or one JSON object a line is needed")


def _values(path: Path, lines: _Lines, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """(line, value) of each JSON value; in an array nothing after a syntax error can be trusted, so that is fatal."""
    is_first = True
    while True:
        try:
            content = next(lines).rstrip()
        except StopIteration:
            return
        except _BadLine as error:
            bad.report(str(path), lines.number, str(error))
            continue
        if not content:
            continue
        if is_first and content.lstrip().startswith("["):
            blank = "\n" * (lines.number - 1)  # so that line numbers count from the start of the file
            yield from _array(path, f"{blank}{content}\n{_all_text(path, lines)}", bad)
            return
        is_first = False
        try:
            yield lines.number, json.loads(content)
        except (ValueError, RecursionError) as error:
            bad.report(str(path), lines.number, _json_problem(error))


def _all_text(path: Path, lines: _Lines) -> str:
    """The rest of a file."""
    try:
        return "".join(lines)
    except _BadLine as error:
        raise UserError(f"{escape(str(path))}:{lines.number}: {error}") from None


def _array(path: Path, content: str, bad: BadRows) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder().raw_decode
    line, counted = 1, 0
    at = _skip_space(content, content.index("[") + 1)
    more = content[at : at + 1] != "]"
    while more:
        line, counted = line + content.count("\n", counted, at), at
        try:
            value, at = decode(content, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            bad.report(str(path), line, _json_problem(error), can_skip=False)
        yield line, value
        at = _skip_space(content, at)
        more = content[at : at + 1] == ","
        if more:
            at = _skip_space(content, at + 1)
    after = _skip_space(content, at + 1)
    if content[at : at + 1] != "]":
        bad.report(str(path), 1 + content.count("\n", 0, at), "invalid JSON (',' or ']' expected)", can_skip=False)
    if after != len(content):
        line = 1 + content.count("\n", 0, after)
        bad.report(str(path), line, "invalid JSON (text after the end of the array)", can_skip=False)


def _skip_space(content: str, at: int) -> int:
    return SPACE.match(content, at).end()


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "invalid JSON (nested too deeply)"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg} at column {error.colno})"
    return f"invalid JSON ({str(error).splitlines()[0]})"


def _unwritable(key: str, cell: Any) -> str | None:
    """Why a value cannot be tokenized and written: JSON can spell what UTF-8 text cannot hold."""
    for part in (key, cell):
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                return f"{key!a}: lone surrogate \\u{ord(part[error.start]):04x}"
        if isinstance(part, str) and "\0" in part:
            return f"{key!a}: NUL character"
    return None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _listed(names: list[str]) -> str:
    return ", ".join(escape(name) for name in names)
