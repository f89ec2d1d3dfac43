"""Texts -> token ids -> files that gpt/data.py maps into memory, and back from files that nobody vouches for.

<split>.bin holds the ids of all documents one after the other, uint16; <split>.index.npy one row per document: start,
response_start, end, as offsets into it.
"""

import os
import re
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpt import sources
from gpt.console import escape
from gpt.errors import ENVIRONMENT, USAGE, UserError
from gpt.prompts import TEMPLATES, format_prompt
from gpt.records import Record
from gpt.tokenizer import Tokenizer

CHUNK = 256  # texts that a thread takes at a time
PIECE = 2**18  # characters of a long text that are encoded at a time
# GPT-2 cuts text into words before merging; a word never reaches across a single line feed followed by a character
# that is not whitespace. What is before and after such a place can be encoded apart.
SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)")

REMEDY = "prepare the data again with prepare_data.py"


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each text, uint16. The tokenizer works outside Python's global lock, so threads help."""
    chunks = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        encoded = threads.map(lambda chunk: [_ids(text, tokenizer) for text in chunk], chunks)
        return [ids for chunk in encoded for ids in chunk]


def _ids(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(text), dtype=np.uint16)  # raises OverflowError for an id above 65,535


def encode_prompts(records: Sequence[Record], template: str, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each record's prompt. What all prompts begin with is encoded once where that makes no difference."""
    fixed = TEMPLATES[template].header + TEMPLATES[template].instruction
    prompts = [format_prompt(template, r.instruction, r.input) for r in records]
    shared = [p.startswith(fixed) and (not fixed or SAFE_CUT.match(p, len(fixed)) is not None) for p in prompts]
    head = _ids(fixed, tokenizer)
    rest = encode([p[len(fixed) :] if s else p for p, s in zip(prompts, shared, strict=True)], tokenizer)
    return [np.concatenate([head, ids]) if s else ids for ids, s in zip(rest, shared, strict=True)]


def encode_long(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text of any length, the same as if it were encoded at once."""
    pieces, start = [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + PIECE)
        end = cut.start() if cut else len(text)
        pieces.append(text[start:end])
        start = end
    return np.concatenate([np.empty(0, np.uint16), *encode(pieces, tokenizer)])


def names(split: str) -> tuple[str, str]:
    """The names of a split's two files."""
    return f"{split}.bin", f"{split}.index.npy"


def write(directory: Path, split: str, documents: Sequence[Sequence[np.ndarray]], response: int | None) -> dict:
    """Writes both files of a split and returns its counts. Each document is given as parts that are joined; its
    response begins at part number `response`, or at its start when that is None."""
    n_parts = [[len(part) for part in document] for document in documents]
    lengths = np.array([sum(parts) for parts in n_parts], dtype=np.int64)
    end = np.cumsum(lengths)
    start = end - lengths
    before = np.array([sum(parts[:response]) if response else 0 for parts in n_parts], dtype=np.int64)
    flat = [part for document in documents for part in document]
    ids = np.concatenate([np.empty(0, np.uint16), *flat])
    ids.astype("<u2", copy=False).tofile(directory / names(split)[0])
    index = np.stack([start, start + before, end], axis=1).astype("<i8", copy=False)
    np.save(directory / names(split)[1], index)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "response_tokens": int((lengths - before).sum()),
    }


def read(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, documents) of a split: all ids, mapped into memory, and (n, 3) offsets.

    Raises UserError for files that `write` did not write: nothing in them is executed, no size they claim is believed.
    """
    paths = [directory / name for name in names(split)]
    try:
        ids, documents = _read_ids(paths[0]), _read_index(paths[1])
    except OSError as error:
        code = USAGE if isinstance(error, FileNotFoundError | NotADirectoryError) else ENVIRONMENT
        name = Path(error.filename or directory).name
        raise UserError(f"cannot read {name}", f"{directory}: {error.strerror or error}", REMEDY, code) from error
    start, response, end = documents.T
    borders = np.concatenate([[0], end])
    if not np.array_equal(start, borders[:-1]) or borders[-1] != len(ids):
        raise damaged(paths[1], f"its documents do not make up the {len(ids)} tokens")
    if not ((start <= response) & (response <= end) & (start < end)).all():
        raise damaged(paths[1], "a response outside its document")
    return ids, documents


def _read_ids(path: Path) -> np.ndarray:
    n_bytes = _size(path)
    if n_bytes % 2:
        raise damaged(path, f"{n_bytes} bytes are no whole number of ids")
    return np.memmap(path, dtype="<u2", mode="r") if n_bytes else np.empty(0, "<u2")  # an empty file cannot be mapped


def _read_index(path: Path) -> np.ndarray:
    """(n, 3) int64. np.load would reserve whatever memory the header asks for; mapping compares it with the size of
    the file first. Neither of them is let near a pickle."""
    n_bytes = _size(path)
    with open(path, "rb") as file:
        if file.read(8) != b"\x93NUMPY\x01\x00":  # later versions may have a header of 4 GiB
            raise damaged(path, "not an .npy file of version 1.0")
    try:
        with warnings.catch_warnings(action="error"):
            index = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # parsing a header that somebody made up fails in many ways
        raise damaged(path, str(error)) from error
    if index.dtype != "<i8" or index.ndim != 2 or index.shape[1] != 3 or not index.flags.c_contiguous:
        raise damaged(path, f"{index.dtype.str} of shape {index.shape}, rows of three <i8 are needed")
    if n_bytes != index.offset + index.nbytes:
        raise damaged(path, f"{n_bytes - index.offset - index.nbytes} bytes too long")
    return np.array(index)


def _size(path: Path) -> int:
    """Raises UserError for what is no ordinary file: opening a pipe would wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise damaged(path, "not an ordinary file")
    return status.st_size


def check(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises UserError for the first of some files that is not as it was written: {name: {"bytes", "sha256"}}.

    Token files are hashed, once at each start: milliseconds for MedQuAD, about 1.2 s for 2 GB.
    """
    for name, file in files.items():
        path = directory / name
        if not os.path.isfile(path):
            raise damaged(path, "not an ordinary file" if os.path.lexists(path) else "missing")
        if path.stat().st_size != file["bytes"]:
            raise damaged(path, f"{path.stat().st_size} bytes, not {file['bytes']}")
    for name, file in files.items():
        if name.endswith((".bin", ".npy")) and sources.sha256(directory / name) != file["sha256"]:
            raise damaged(directory / name, "sha256 differs")


def damaged(path: Path, reason: str) -> UserError:
    """What is said of a file of prepared data that is not as it was written."""
    reason = " ".join(reason.split())[:160]
    return UserError(f"{escape(path.name)} damaged ({escape(reason)})", str(path.parent), REMEDY)
