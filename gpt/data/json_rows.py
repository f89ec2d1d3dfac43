"""Reads the objects of JSON Lines, or of one JSON array, strictly, as RFC 8259 says.

Strict means: no NaN or Infinity, no white space but its own; nor a key twice in an object, of which json would keep the
last. JSON Lines are read one at a time; the text of an array is in memory as a whole, its objects one at a time.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.data.text_files import PIECE, BadLine, TextFile, open_text, shorten
from gpt.errors import UserError
from gpt.terminal.console import escape

ARRAY_LIMIT = 10**9  # bytes: in memory they may take eight times that, where one emoji makes each character 4 bytes
SPACE = re.compile(r"[ \t\r\n]*")
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
KINDS = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}

Rows = Iterator[tuple[int, Any, str | None]]  # the line where each begins, its value, what is wrong with it


def read(path: Path) -> Rows:
    """(line, object, what is wrong) of each row, whatever the file is called. Raises UserError for a file without rows,
    for an array of more than ARRAY_LIMIT bytes, and for a syntax error in one: after it nothing can be trusted."""
    is_empty = True
    parse = _array if _is_array(path) else _lines
    with open_text(path) as file:
        for line, value, problem in parse(file):
            is_empty = False
            if not problem and not isinstance(value, dict):
                problem = f"{KINDS.get(type(value), 'null')} where an object {{...}} is needed"
            yield line, value, problem or next(filter(None, map(_unwritable, value, value.values())), None)
    if is_empty:
        raise UserError(f"{escape(str(path))} is empty", remedy="a JSON array or one JSON object a line is needed")


def _is_array(path: Path) -> bool:
    """Whether the first character of a file, white space aside, is a [."""
    with open_text(path) as file:
        start = file.file.read(PIECE).removeprefix(codecs.BOM_UTF8)
        while start and not start.strip(b" \t\r\n"):
            start = file.file.read(PIECE)
    return start.lstrip(b" \t\r\n").startswith(b"[")


def _lines(file: TextFile) -> Rows:
    """One value of each line that is not blank."""
    decoder = _Decoder()
    while True:
        try:
            row = file.row()
            content = row.rstrip(" \t\r\n")
            value = decoder.decode(content) if content else None
        except BadLine as error:
            yield error.line, None, str(error)
        except (json.JSONDecodeError, RecursionError) as error:
            yield file.first, None, _problem(error)
        else:
            if content:
                yield file.first, value, decoder.problem
            if not row:
                return


def _array(file: TextFile) -> Rows:
    """The elements of the array that a file holds."""
    decoder, text = _Decoder(), _whole(file)
    at, line = 0, 1  # a place in the text, and its line

    def move(to: int) -> str:
        """The character at the place `to`, or the next one that is no white space; "" at the end of the text."""
        nonlocal at, line
        end = SPACE.match(text, to).end()
        line += text.count("\n", at, end)
        at = end
        return text[at : at + 1]

    move(0)
    has_more = move(at + 1) != "]"
    while has_more:
        first = line
        try:
            value, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadLine(getattr(error, "lineno", line), _problem(error)) from None
        mark = move(end)
        yield first, value, decoder.problem
        has_more = mark == ","
        if has_more:
            move(at + 1)
    if text[at : at + 1] != "]":
        raise BadLine(line, "invalid JSON (',' or ']' expected)")
    if move(at + 1):
        raise BadLine(line, "invalid JSON (text after the end of the array)")


def _whole(file: TextFile) -> str:
    pieces = []
    while piece := file.read(PIECE):
        pieces.append(piece)
        if file.n_bytes > ARRAY_LIMIT:
            raise UserError(
                f"{escape(str(file.path))} is a JSON array of more than {ARRAY_LIMIT:,} bytes",
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


def _unwritable(key: str, cell: Any) -> str | None:
    """Why a value cannot be tokenized and written: JSON can spell what UTF-8 text cannot hold."""
    for part in (key, cell):
        is_suspect = isinstance(part, str) and ("\0" in part or not part.isascii())
        if is_suspect and (match := UNWRITABLE.search(part)):
            code = ord(match[0])
            return f"{shorten(key)!a}: " + (f"lone surrogate \\u{code:04x}" if code else "NUL character")
    return None
