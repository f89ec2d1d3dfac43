"""Reads the rows of a CSV file strictly, as RFC 4180 says; lines may also end in a lone line feed.

Fields may have another delimiter than the comma: the one that data.delimiter or a first line such as `sep=;` names, or
else the only one with which the header has the columns that are needed, if every row has as many fields.
"""

import csv
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt.data.columns import DELIMITERS, NoColumn, Wanted, find
from gpt.data.text_files import BadLine, TextFile, open_text, shorten
from gpt.errors import UserError
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

NAMED_IN_FILE = re.compile(r'"?sep=([^"\r\n])"?[,;\t|]*\r?\n?', re.I)  # Excel reads a first line `sep=;`
RETURN = "a carriage return inside a field without quotes"
TYPED = DELIMITERS | {r"\t": "\t"}  # what one can type -> the delimiter; others stand for themselves


def read(path: Path, wanted: Wanted) -> Iterator[tuple[int, dict[str, str], str | BadLine | None]]:
    """(line, cells by column, what is wrong) of each row. Raises UserError for a file without rows or without a column
    that is needed, and for what makes it unknowable where the next row begins."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than one long article
    delimiter = TYPED.get(wanted.delimiter or "", wanted.delimiter) or _delimiter(path, wanted)
    with open_text(path, encoding=wanted.encoding) as file:
        rows = _Rows(file, delimiter, wanted)
        yield from rows
    if rows.header is None:
        raise UserError(f"{escape(str(path))} is empty", remedy="a CSV file with a header line is needed")
    if rows.is_empty:
        columns = escape(shorten(", ".join(rows.header), 400))
        raise UserError(f"{escape(str(path))} has a header line and no rows", f"columns {columns}")


class _Rows:
    """The rows of a CSV file with a certain delimiter, as `read` gives them."""

    def __init__(self, file: TextFile, delimiter: str, wanted: Wanted) -> None:
        self.file, self.delimiter, self.wanted = file, delimiter, wanted
        self.header: list[str] | None = None
        self.is_empty = True

    def __iter__(self) -> Iterator[tuple[int, dict[str, str], str | BadLine | None]]:
        file, syntax, n_named = self.file, _syntax(self.delimiter), 0
        while True:
            problem: str | BadLine | None
            try:
                row = file.row(multiline=True)
                problem = unclear = _problem(row, syntax, self.delimiter)
                line = file.first
            except BadLine as error:  # the bytes still say where the row ends
                row, problem, line = file.raw.decode("latin-1"), error, error.line
                unclear = _problem(row, syntax, self.delimiter)
            if problem:
                # Of a row that goes on in lines to come, where the next one starts cannot be known.
                if self.header is None and problem == RETURN and "\n" not in row:
                    raise BadLine(line, "its lines end in carriage returns", "save it as CSV (UTF-8)")
                if self.header is None or (unclear and (file.quotes % 2 or "\n" in row[:-1])):
                    raise problem if isinstance(problem, BadLine) else BadLine(line, problem)
                self.is_empty = False
                yield line, {}, problem
                continue
            if not row:
                return
            if row in ("\n", "\r\n") or (line == 1 and NAMED_IN_FILE.fullmatch(row)):
                continue
            cells = next(csv.reader([row], strict=True, delimiter=self.delimiter))
            if self.header is None:
                self.header = _header(line, cells, self.wanted)
                n_named = max((i for i, cell in enumerate(cells, start=1) if cell.strip()), default=len(cells))
                continue
            if self.is_empty and self.delimiter == "|" and set("".join(cells)) <= set("-: "):
                raise BadLine(line, "a table of Markdown", "save it as CSV")
            self.is_empty = False
            n_missing = len(self.header) - len(cells)
            # Spreadsheets write the empty fields of columns without a name in some rows only.
            if n_missing and (n_missing < 0 or len(cells) < n_named or any(cells[n_named:])):
                fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
                yield line, {}, f"{fields}, the header has {len(self.header)}"
            else:
                yield line, dict(zip(self.header, cells + [""] * n_missing, strict=True)), None


def _delimiter(path: Path, wanted: Wanted) -> str:
    """The delimiter of a file. Raises UserError for a row that does not fit the one that the header has."""
    usual = "\t" if {suffix.lower() for suffix in path.suffixes} & {".tsv", ".tab"} else ","
    with open_text(path, encoding=wanted.encoding) as file:
        while (row := file.row(multiline=True)) in ("\n", "\r\n"):
            pass
    if named := NAMED_IN_FILE.fullmatch(row):
        return named[1]
    fitting = [delimiter for delimiter in DELIMITERS.values() if wanted.fits(_cells(row, delimiter))]
    if not row or wanted.kind is None or usual in fitting or len(fitting) != 1:
        return usual
    word = next(word for word, delimiter in DELIMITERS.items() if delimiter == fitting[0])
    with open_text(path, encoding=wanted.encoding) as file:
        for line, _, problem in _Rows(file, fitting[0], wanted):
            if isinstance(problem, str):
                where, remedy = f"{escape(str(path))}:{line}", f"correct it, or set data.delimiter={word}"
                raise UserError(f"{where}: {problem}, with the delimiter {word}, as in the header", remedy=remedy)
    log.info(f"{escape(path.name)} is read with the delimiter {word}, which its header and all its rows have")
    return fitting[0]


def _cells(row: str, delimiter: str) -> list[str]:
    """The fields of a row; none where they could not have this delimiter."""
    is_right = _problem(row, _syntax(delimiter), delimiter) is None
    return next(csv.reader([row], strict=True, delimiter=delimiter), []) if is_right else []


def _syntax(delimiter: str) -> re.Pattern[str]:
    mark = re.escape(delimiter)
    field = rf'(?:"[^"]*+(?:""[^"]*+)*+"|[^"{mark}\r\n]*+)'
    return re.compile(rf"{field}(?:{mark}{field})*+(?:\r?\n)?")


def _problem(row: str, syntax: re.Pattern[str], delimiter: str) -> str | None:
    """What RFC 4180 does not allow. The csv module takes a quote in a field that has none around it, which is what a
    damaged quote leaves behind: fields, and then rows, that begin and end elsewhere."""
    end = syntax.match(row).end()
    if end == len(row):
        return None
    if row[end] == "\r":
        return RETURN
    if row[end] != '"':
        return "text after the closing quote of a field"
    is_opening = end == 0 or row[end - 1] == delimiter
    return "a quoted field is never closed" if is_opening else "a quote inside a field without quotes"


def _header(line: int, cells: list[str], wanted: Wanted) -> list[str]:
    """The names of the columns, each once. Those that are not needed may lack a name, or have that of another."""
    if wanted.kind:
        try:
            find(cells, wanted.kind, wanted.chosen)
        except NoColumn as error:
            raise BadLine(line, str(error), error.remedy) from None
    needed = {name.strip().casefold() for name in wanted.used(cells)}
    names: list[str] = []
    seen: set[str] = set()
    for i, cell in enumerate(cells, start=1):
        key = cell.strip().casefold()
        if key in seen and key in needed:
            raise BadLine(line, f"column {shorten(cell)!r} occurs twice in the header")
        names.append(f"column {i} without a name" if not key else f"{cell}, column {i}" if key in seen else cell)
        seen |= {key} - {""}
    return names
