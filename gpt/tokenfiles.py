"""Texts -> token ids -> files that gpt/data.py maps into memory.

<split>.bin holds the ids of all documents one after the other, uint16; <split>.index.npy one row per document: start,
response_start, end, as offsets into it.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt.prompts import TEMPLATES, format_prompt
from gpt.records import Record
from gpt.tokenizer import Tokenizer

CHUNK = 256  # texts that a thread takes at a time
PIECE = 2**18  # characters of a long text that are encoded at a time
# GPT-2 cuts text into words before merging; a word never reaches across a single line feed followed by a character
# that is not whitespace. What is before and after such a place can be encoded apart.
SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)")


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
    ids.astype("<u2", copy=False).tofile(directory / f"{split}.bin")
    index = np.stack([start, start + before, end], axis=1).astype("<i8", copy=False)
    np.save(directory / f"{split}.index.npy", index)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "response_tokens": int((lengths - before).sum()),
    }
