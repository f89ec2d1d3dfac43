"""Reads a JSON object from a file that anybody may have written."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, largest: int = 2**26) -> dict[str, Any]:
    """An object of at most `largest` bytes. Raises OSError, and ValueError for anything else than that."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("not a file")  # reading from a pipe would wait
    if size > largest:
        raise ValueError(f"more than {largest} bytes")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("no object")
    return content
