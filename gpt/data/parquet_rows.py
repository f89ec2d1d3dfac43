"""Reads the rows of a Parquet file in batches, with pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.data.columns import Wanted
from gpt.data.json_rows import unwritable
from gpt.errors import ENVIRONMENT, UserError
from gpt.terminal.console import escape

BATCH = 1000  # rows in memory at a time


def read(path: Path, wanted: Wanted) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(number, values by column, what is wrong) of each row. Raises UserError for a file without rows, and for one
    that is no Parquet file, or damaged: after that nothing can be trusted."""
    import pyarrow  # 0.1 s
    from pyarrow import parquet

    number, shown = 0, escape(str(path))
    try:
        with open(path, "rb") as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                repeated = next(name for name in names if names.count(name) > 1)
                raise UserError(f"column {escape(repeated[:40])} occurs twice", shown, "name the columns differently")
            for batch in file.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values, next(filter(None, map(unwritable, values, values.values())), None)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = escape(" ".join(str(error).split())[:160])
        raise UserError(f"{shown} is no Parquet file, or damaged: {reason}", remedy="get the file again") from error
    except OSError as error:
        reason = escape(" ".join((error.strerror or str(error)).split())[:160])
        if error.errno is None:  # pyarrow's own
            raise UserError(f"{shown} is damaged: {reason}", remedy="get the file again") from error
        raise UserError(f"cannot read {shown}", reason, code=ENVIRONMENT) from error
    if not number:
        raise UserError(f"{shown} has no rows", remedy="a file with at least one row is needed")
