"""Reads the rows of a file in any of the formats that are known, gzipped or not, one at a time.

Nothing is guessed or mended: what cannot be read as it stands is reported with its file and line, and counted if the
configuration says that such rows may be left out. A form that has one meaning only is read, and a log line says so.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data import csv_rows, json_rows, parquet_rows, unread_formats
from gpt.data.columns import NoColumn, Wanted, find
from gpt.errors import UserError
from gpt.terminal.console import escape

# What a file's name ends in -> the function that gives (line, values, what is wrong with the row) of each of its rows.
FORMATS: dict[str, Callable[[Path, Wanted], Iterator[tuple[int, dict[str, Any], Any]]]] = {
    ".csv": csv_rows.read,
    ".tsv": csv_rows.read,
    ".tab": csv_rows.read,
    ".json": json_rows.read,
    ".jsonl": json_rows.read,
    ".ndjson": json_rows.read,
    ".parquet": parquet_rows.read,
}


class Row(NamedTuple):
    """One row as it stands in its file: `line` is where it starts, counted from 1."""

    where: str
    line: int
    values: dict[str, Any]
    split: str | None = None  # the split that the publisher put it into, if any


class BadRows:
    """What happens to a row that cannot be used: "error" stops with a UserError, "skip" describes it in `left_out`.

    `setting` is what a person sets to have such rows left out, if there is such a setting.
    """

    def __init__(self, policy: str, setting: str | None = "data.on_bad_row=skip") -> None:
        self.policy, self.setting = policy, setting
        self.left_out: list[str] = []

    def report(self, where: str, line: int, problem: str, remedy: str = "correct it") -> None:
        """Raises UserError unless the row may be left out."""
        if self.policy == "error":
            remedy += f", or leave such rows out with {self.setting}" if self.setting else ""
            raise UserError(f"{escape(where)}:{line}: {escape(problem)}", remedy=remedy)
        self.left_out.append(f"{escape(Path(where).name)}:{line}: {escape(problem)}")


def suffix_of(path: Path) -> str:
    """What a file's name ends in, .gz aside: the key in FORMATS where it is one."""
    return next((suffix for suffix in map(str.lower, reversed(path.suffixes)) if suffix != ".gz"), "")


def format_of(path: Path) -> str | None:
    """The key in FORMATS of a file, by its name, or by its content where that is JSON; None for another file."""
    if (suffix := suffix_of(path)) in FORMATS:
        return suffix
    unread_formats.refuse_name(path)
    return ".jsonl" if json_rows.is_json(path) else None


def read(path: Path, bad: BadRows, wanted: Wanted | None = None) -> Iterator[Row]:
    """The rows of a file; one whose name and content say nothing is CSV. `wanted` says which columns are needed.
    Raises UserError for what is wrong with the file or, unless `bad` takes it, with a row."""
    for line, values, problem in FORMATS[format_of(path) or ".csv"](path, wanted or Wanted()):
        if problem:
            bad.report(str(path), line, str(problem), getattr(problem, "remedy", "correct it"))
        else:
            yield Row(str(path), line, values)


def read_known(path: Path, bad: BadRows, kind: str) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Each row of a file, with its cells by our names of the columns that `kind` has. Raises UserError as `read` does,
    and for a row without a column that is needed."""
    for row in read(path, bad, Wanted(kind)):
        try:
            names = find(row.values, kind, {})
        except NoColumn as error:
            bad.report(row.where, row.line, str(error), error.remedy)
            continue
        yield row, {name: row.values[column] for name, column in names.items()}
