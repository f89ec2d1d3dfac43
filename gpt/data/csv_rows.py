"""Reads the rows of a CSV file strictly, as RFC 4180 says; lines may also end in a lone line feed."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt.data.text_files import BadLine, open_text, shorten
from gpt.errors import UserError
from gpt.terminal.console import escape

FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|[^",\r\n]*+)'
ROW = re.compile(rf"{FIELD}(?:,{FIELD})*+(?:\r?\n)?")


def read(path: Path) -> Iterator[tuple[int, dict[str, str], str | None]]:
    """(line, cells by column, what is wrong) of each row. Raises UserError for a file without rows, and for what makes
    it unknowable where the next row begins."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than one long article
    header: list[str] | None = None
    is_empty = True
    with open_text(path) as file:
        while True:
            try:
                row = file.row(multiline=True)
                problem, line, n_lines = _problem(row), file.first, row.count("\n", 0, -1) + 1
            except BadLine as error:
                problem, line, n_lines = str(error), error.line, error.line - file.first + 1
            if problem:
                # Of a row that goes on in lines to come, where the next one starts cannot be known.
                if n_lines > 1 or file.quotes % 2 or header is None:
                    raise BadLine(line, problem)
                is_empty = False
                yield line, {}, problem
                continue
            if not row:
                break
            if row in ("\n", "\r\n"):
                continue
            cells = next(csv.reader([row], strict=True))
            if header is None:
                header = _header(line, cells)
                continue
            is_empty = False
            if len(cells) != len(header):
                fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
                yield line, {}, f"{fields}, the header has {len(header)}"
            else:
                yield line, dict(zip(header, cells, strict=True)), None
    if header is None:
        raise UserError(f"{escape(str(path))} is empty", remedy="a CSV file with a header line is needed")
    if is_empty:
        columns = escape(shorten(", ".join(header), 400))
        raise UserError(f"{escape(str(path))} has a header line and no rows", f"columns {columns}")


def _problem(row: str) -> str | None:
    """What RFC 4180 does not allow. The csv module takes a quote in a field that has none around it, which is what a
    damaged quote leaves behind: fields, and then rows, that begin and end elsewhere."""
    end = ROW.match(row).end()
    if end == len(row):
        return None
    if row[end] == "\r":
        return "a carriage return inside a field without quotes"
    if row[end] != '"':
        return "text after the closing quote of a field"
    is_opening = end == 0 or row[end - 1] == ","
    return "a quoted field is never closed" if is_opening else "a quote inside a field without quotes"


def _header(line: int, cells: list[str]) -> list[str]:
    seen: set[str] = set()
    for cell in cells:
        if cell.strip().casefold() in seen:
            raise BadLine(line, f"column {shorten(cell)!r} occurs twice in the header")
        seen.add(cell.strip().casefold())
    return cells
