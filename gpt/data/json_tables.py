"""Finds the rows in one JSON object that holds all of them: under a key, or as columns, as pandas writes them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.data.columns import Wanted, listed
from gpt.errors import UserError
from gpt.terminal.console import escape

log = logging.getLogger(__name__)


def rows_in(path: Path, table: Any, wanted: Wanted) -> Iterator[tuple[int, Any, None]] | None:
    """(number, row, None) of each row; None for an object that is one row itself. Raises UserError for an object of
    several tables, and for columns of different lengths."""
    if wanted.kind is None or not isinstance(table, dict) or not table:
        return None
    form, rows = _rows(path, table, wanted)
    if rows is None:
        return None
    log.info(f"{escape(path.name)} is one JSON object with {len(rows):,} rows {form}")
    return ((number, row, None) for number, row in enumerate(rows, start=1))


def _rows(path: Path, table: dict[str, Any], wanted: Wanted) -> tuple[str, list[Any] | None]:
    """How the rows are written, and the rows."""
    parts = list(table.values())
    names, cells = table.get("columns"), table.get("data")
    if _is_list_of(names, str) and _is_list_of(cells, list) and wanted.fits(names):  # pandas' orient=split
        if any(len(row) != len(names) for row in cells):
            raise _unclear(path, "rows under data that are longer or shorter than columns")
        return "under the key data", [dict(zip(names, row, strict=True)) for row in cells]
    if wanted.fits(table) and all(isinstance(part, dict) for part in parts):
        if any(part.keys() != parts[0].keys() for part in parts):
            raise _unclear(path, "columns with different rows")
        return "as columns", [{name: table[name][key] for name in table} for key in parts[0]]
    if wanted.fits(table) and len(table) > 1 and all(isinstance(part, list) for part in parts):
        if len({len(part) for part in parts}) > 1:
            raise _unclear(path, "columns of different lengths")
        return "as columns", [dict(zip(table, cells, strict=True)) for cells in zip(*parts, strict=True)]
    if wanted.fits(table):
        return "", None
    if all(isinstance(part, dict) and wanted.fits(part) for part in parts):
        return "each under a key of its own", parts
    keys = [key for key, part in table.items() if _is_list_of(part, dict)]
    fitting = [key for key in keys if wanted.fits(table[key][0])]
    if len(fitting) > 1:
        raise _unclear(path, f"rows under {listed(fitting)}")
    keys = fitting or keys
    if len(keys) != 1 and any(isinstance(part, dict) or _is_list_of(part, dict) for part in parts):
        raise _unclear(path, f"the keys {listed(list(table))}, none of which has rows with the columns that are needed")
    return (f"under the key {escape(keys[0][:40])}", table[keys[0]]) if len(keys) == 1 else ("", None)


def _is_list_of(part: Any, kind: type) -> bool:
    return isinstance(part, list) and bool(part) and all(isinstance(element, kind) for element in part)


def _unclear(path: Path, what: str) -> UserError:
    return UserError(f"{escape(str(path))} is one JSON object with {what}", remedy="write one array, or JSON Lines")
