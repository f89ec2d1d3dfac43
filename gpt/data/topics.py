"""Records what the questions of prepared data are about, and where they are from, beside their tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.data import token_files
from gpt.files.json_file import read_object

FILE = "topics.json"  # [focus, source] of each document of each split
LIMIT = 2**26  # bytes
Topic = tuple[str, str]


def write(directory: Path, topics: Mapping[str, Sequence[Topic]]) -> None:
    """Writes the topics of each split; no file where none is known."""
    if any(any(topic) for of_split in topics.values() for topic in of_split):
        (directory / FILE).write_text(json.dumps(topics) + "\n", encoding="utf-8")


def read(directory: Path, meta: Mapping[str, Any], split: str) -> list[Topic]:
    """(focus, source) of each document of a split of prepared data; empty where they are not known. Raises UserError
    (2) for a file that is not as it was written."""
    if FILE not in meta["files"]:
        return []
    path = directory / FILE
    try:
        topics = [(str(focus), str(source)) for focus, source in read_object(path, LIMIT)[split]]
        if len(topics) != meta["splits"][split]["documents"]:
            raise ValueError(f"{len(topics)} documents in split {split}")
        return topics
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise token_files.damaged(path, str(error)) from error
