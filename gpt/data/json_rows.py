"""Reads the objects of JSON, strictly, as RFC 8259 says: JSON Lines, one array, or objects one after the other.

Strict means: no NaN or Infinity, no white space but its own; nor a key twice in an object, of which json would keep the
last. JSON Lines are read one at a time; the text of other forms is in memory as a whole. One object that is no row
itself may hold the rows: gpt/data/json_tables.py.
"""

import codecs
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.data import json_tables
from gpt.data.columns import Wanted
from gpt.data.text_files import PIECE, ROW_LIMIT, BadLine, TextFile, open_text, shorten
from gpt.errors import UserError
from gpt.terminal.console import escape

ARRAY_LIMIT = 10**9  # bytes: in memory they may take eight times that, where one emoji makes each character 4 bytes
PROBE = 2**20  # bytes in which the first object of a file is looked for
SPACES = b" \t\r\n"
SPACE = re.compile(r"[ \t\r\n]*")
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
KINDS = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}

Rows = Iterator[tuple[int, Any, Any]]  # the line where each begins, its value, what is wrong with it

log = logging.getLogger(__name__)


def read(path: Path, wanted: Wanted) -> Rows:
    """(line, object, what is wrong) of each row, whatever the file is called. Raises UserError for a file without rows,
    for one of more than ARRAY_LIMIT bytes that is not JSON Lines, and for a syntax error in such a one: after it
    nothing can be trusted."""
    is_empty = True
    parse = _lines if _is_lines(path, wanted) else _whole
    with open_text(path, encoding=wanted.encoding) as file:
        for line, value, problem in parse(file, wanted):
            is_empty = False
            if not problem and not isinstance(value, dict):
                problem = f"{KINDS.get(type(value), 'null')} where an object {{...}} is needed"
            yield line, value, problem or next(filter(None, map(unwritable, value, value.values())), None)
    if is_empty:
        raise UserError(f"{escape(str(path))} is empty", remedy="a JSON array or one JSON object a line is needed")


def is_json(path: Path) -> bool:
    """Whether a file begins as an object of JSON does, or as an array of such."""
    with open_text(path) as file:
        try:
            return bool(re.match(r'\s*(\[\s*)?\{\s*"', file.read(PIECE)))
        except (BadLine, UserError):  # whoever reads it says so
            return False


def _is_lines(path: Path, wanted: Wanted) -> bool:
    """Whether each line holds a value of its own: not where an array begins, or an object that goes on in the next
    line, or where there is one object only, which may hold all rows."""
    with open_text(path, encoding=wanted.encoding) as text:
        start = text.file.readline(ROW_LIMIT).removeprefix(codecs.BOM_UTF8)
        while start and not start.strip(SPACES):
            start = text.file.readline(ROW_LIMIT)
        first = start.strip(SPACES).decode("utf-8", "replace")
        if not first.startswith("{"):
            return not first.startswith("[")
        if len(start) > ROW_LIMIT - len(codecs.BOM_UTF8) - 1:  # an object that holds all rows
            return False
        try:
            _Decoder().decode(first)
            has_more = any(piece.strip(SPACES) for piece in iter(lambda: text.file.read(PIECE), b""))
            return has_more or "\ufffd" in first
        except RecursionError:
            return True
        except json.JSONDecodeError:
            rest = text.file.read(PROBE)
    content = first + "\n" + rest.decode("utf-8", "replace")
    try:
        return _Decoder().raw_decode(content)[1] <= len(first)
    except RecursionError:
        return True
    except json.JSONDecodeError as error:  # of a broken line, or because an object of that length is cut here
        is_cut = error.msg.startswith("Unterminated") or error.pos > len(content) - len("\\ud83d\\ude00")
        return len(rest) < PROBE or not is_cut


def _lines(file: TextFile, wanted: Wanted) -> Rows:
    """One value of each line that is not blank."""
    decoder = _Decoder()
    while True:
        try:
            row = file.row()
            content = row.rstrip(" \t\r\n")
            value = decoder.decode(content) if content else None
        except BadLine as error:
            yield error.line, None, error
        except (json.JSONDecodeError, RecursionError) as error:
            yield file.first, None, _problem(error)
        else:
            if content:
                yield file.first, value, decoder.problem
            if not row:
                return


def _whole(file: TextFile, wanted: Wanted) -> Rows:
    """The elements of the array that a file holds, or its objects."""
    decoder, text = _Decoder(), _text(file)
    at, line = 0, 1  # a place in the text, and its line

    def move(to: int) -> str:
        """The character at the place `to`, or the next one that is no white space; "" at the end of the text."""
        nonlocal at, line
        end = SPACE.match(text, to).end()
        line += text.count("\n", at, end)
        at = end
        return text[at : at + 1]

    is_array = move(0) == "["
    n_values, has_more = 0, move(at + 1) != "]" if is_array else bool(text[at:])
    while has_more:
        first = line
        try:
            value, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadLine(getattr(error, "lineno", line), _problem(error)) from None
        mark, n_values = move(end), n_values + 1
        if not is_array and n_values == 1 and not mark and not decoder.problem:
            yield from json_tables.rows_in(file.path, value, wanted) or [(first, value, None)]
            return
        yield first, value, decoder.problem
        has_more = mark == "," if is_array else bool(mark)
        if has_more and is_array:
            move(at + 1)
    if is_array and text[at : at + 1] != "]":
        raise BadLine(line, "invalid JSON (',' or ']' expected)")
    if is_array and move(at + 1):
        raise BadLine(line, "invalid JSON (text after the end of the array)")
    if not is_array and n_values:
        log.info(f"{escape(file.path.name)} has objects over several lines: {n_values:,} rows")


def _text(file: TextFile) -> str:
    pieces = []
    while piece := file.read(PIECE):
        pieces.append(piece)
        if file.n_bytes > ARRAY_LIMIT:
            raise UserError(
                f"{escape(str(file.path))} is not JSON Lines and has more than {ARRAY_LIMIT:,} bytes",
                remedy="convert it to JSON Lines, which may have any length",
            )
    return "".join(pieces)


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


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg} at column {error.colno})"
    return "invalid JSON (nested too deeply)"


def unwritable(key: str, cell: Any) -> str | None:
    """Why a value cannot be tokenized and written: JSON can spell what UTF-8 text cannot hold."""
    for part in (key, cell):
        is_suspect = isinstance(part, str) and ("\0" in part or not part.isascii())
        if is_suspect and (match := UNWRITABLE.search(part)):
            code = ord(match[0])
            return f"{shorten(key)!a}: " + (f"lone surrogate \\u{code:04x}" if code else "NUL character")
    return None
