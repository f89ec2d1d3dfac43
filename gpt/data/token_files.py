"""Encodes texts into files of token ids, which gpt/data/batching.py maps into memory, and checks those of others.

<split>.bin holds the ids of all documents one after the other, uint16, or uint32 where the vocabulary is larger than
that; <split>.index.npy one row per document: start, response_start, end, as offsets into it.
"""

import hashlib
import os
import re
import stat
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gpt.data import sources, text_files
from gpt.data.records import Record
from gpt.errors import ENVIRONMENT, USAGE, UserError
from gpt.prompts import TEMPLATES, format_prompt
from gpt.terminal.console import escape
from gpt.tokenizer import Tokenizer

PIECE = 2**16  # characters of running text that are encoded at a time
BATCH = 2**18  # characters of records, in 30 ms: a thread may wait 5 ms for Python's lock before it can take the next
AHEAD = 32  # pieces or batches that may wait; so many that reading goes on, and the processors have work when it ends
UNCUT_LIMIT = 2**22  # characters; encoding a word of that length takes up to 0.5 GB and 4 s
REMEDY = "prepare the data again with prepare_data.py"

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of each item, in their order, in as many threads as there are processors. Only AHEAD items
    are taken before their turn, so any number of them needs the same memory."""
    n_threads = os.cpu_count() or 1
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_threads) as threads:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > n_threads + AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each text, while the next texts are being made: the tokenizer works outside Python's global
    lock, and so long at a time that it does not wait for it."""
    for encoded in in_order(tokenizer.ids_of_each, _batches(texts)):
        yield from encoded


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, n_chars = [], 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= BATCH:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def encode_records(records: Iterable[Record], template: str, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, ...]]:
    """The ids of each record's prompt and of its response. What all prompts begin with is encoded once where that makes
    no difference."""
    fixed = (TEMPLATES[template].header + TEMPLATES[template].instruction).rstrip()
    head = tokenizer.ids(fixed)
    heads: deque[np.ndarray] = deque()  # of the records that are on their way

    def texts() -> Iterator[str]:
        for record in records:
            prompt = format_prompt(template, record.instruction, record.input)
            is_shared = prompt.startswith(fixed) and tokenizer.safe_cut.match(prompt, len(fixed))
            heads.append(head if is_shared else head[:0])
            yield prompt[len(fixed) :] if is_shared else prompt
            yield record.output

    encoded = encode(texts(), tokenizer)
    for rest, response in zip(encoded, encoded, strict=True):
        yield np.concatenate([heads.popleft(), rest]), response


def encode_files(
    files: list[Path], measured: list[text_files.Measured], borders: list[tuple[str, int, int]], tokenizer: Tokenizer,
    encoding: str | None = None, separator: str | None = None,
) -> Iterator[tuple[str, bool, np.ndarray]]:  # fmt: skip
    """Running text as ids: the split they belong to, whether a document begins with them there, and some ids.

    `measured` is what text_files.measure says of the files, `borders` what splits.text_ranges says of all characters.
    """

    def texts() -> Iterator[tuple[str, bool, str]]:
        before = 0  # characters
        for path, size in zip(files, measured, strict=True):
            after = before + size.n_chars
            sizes = {name: n for name, first, last in borders if (n := min(last, after) - max(first, before)) > 0}
            portions = text_files.portions(path, list(sizes.values()), size.sha256, encoding, separator)
            for name, portion in zip(sizes, portions, strict=True):
                for document in text_files.documents(portion):
                    for i, piece in enumerate(pieces(document, tokenizer.safe_cut, escape(str(path)))):
                        yield name, i == 0, piece
            before = after

    return in_order(lambda part: (part[0], part[1], tokenizer.ids(part[2])), texts())


def pieces(chunks: Iterable[str], safe_cut: re.Pattern[str], where: str) -> Iterator[str]:
    """Running text in pieces of little more than PIECE characters, the ids of which make up those of the whole.

    Raises UserError for a word of more than UNCUT_LIMIT characters, within which there is no safe cut.
    """
    text = ""
    for chunk in chunks:
        searched = max(PIECE, len(text) - 1)  # a cut needs up to two characters after it to be seen
        text += chunk
        while len(text) > searched and (cut := safe_cut.search(text, searched)):
            yield text[: cut.start()]
            text, searched = text[cut.start() :], PIECE
        if len(text) > UNCUT_LIMIT + PIECE:
            raise UserError(
                f"{where}: a word of more than {UNCUT_LIMIT:,} characters, in it {text[PIECE : PIECE + 40]!a}",
                remedy="put line ends or spaces into it",
            )
    if text:
        yield text


def names(split: str) -> tuple[str, str]:
    """The names of a split's two files."""
    return f"{split}.bin", f"{split}.index.npy"


class Writer:
    """The two files of a split on their way to the disk. Ids go there as they come; what stays in memory is 24 bytes a
    document."""

    def __init__(self, directory: Path, split: str, dtype: type[np.unsignedinteger] = np.uint16) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        ids_path, self._index_path = (directory / name for name in names(split))
        self.n_tokens = 0
        self._file = open(ids_path, "wb")  # noqa: SIM115  closed by __exit__
        self._documents = array("q")  # start, response_start, end of each

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, ids: np.ndarray) -> None:
        """Ids of the current document."""
        self._file.write(np.ascontiguousarray(ids, dtype=self._dtype))
        self.n_tokens += len(ids)

    def end_document(self, n_prompt: int = 0) -> None:
        """The current document is complete; its first `n_prompt` ids are the prompt."""
        start = self._last_end()
        self._documents.extend((start, start + n_prompt, self.n_tokens))

    def finish(self) -> dict[str, int]:
        """Writes the index; ids that no document has are a last one. Returns the counts of the split."""
        if self.n_tokens > self._last_end():
            self.end_document()
        index = np.array(self._documents, dtype="<i8").reshape(-1, 3)
        np.save(self._index_path, index)
        self._file.close()  # what it cannot write is an error now
        responses = int((index[:, 2] - index[:, 1]).sum())
        return {"documents": len(index), "tokens": self.n_tokens, "response_tokens": responses}

    def _last_end(self) -> int:
        return self._documents[-1] if self._documents else 0


def read(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, documents) of a split: all ids, mapped into memory, and (n, 3) offsets.

    Raises UserError for files that `Writer` did not write: nothing in them is executed, no size they claim is believed.
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
    dtype = _dtype(path, n_bytes)
    if n_bytes % 2:
        raise damaged(path, f"{n_bytes} bytes are no whole number of ids")
    return np.memmap(path, dtype=dtype, mode="r") if n_bytes else np.empty(0, dtype)  # an empty file cannot be mapped


def _dtype(path: Path, n_bytes: int) -> str:
    """That of the ids in a file: four bytes for each where that makes as many as the index ends with, else two."""
    index_path = path.with_suffix(".index.npy")
    start = max(_size(index_path) - 8, 0)  # and opening what is no ordinary file could wait for ever
    with open(index_path, "rb") as index:
        index.seek(start)
        last = index.read(8)
    return "<u4" if n_bytes == 4 * int.from_bytes(last, "little") > 0 else "<u2"


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


Seen = dict[str, list[int]]  # by the name of a file: inode, size, time of change, and the largest id, see `seen`


def check(directory: Path, files: dict[str, dict[str, Any]], known: Seen | None = None) -> None:
    """Raises UserError for the first of some files that is not as it was written: {name: {"bytes", "sha256"}}.

    Token files are hashed, once at each start: milliseconds for MedQuAD, about 1.2 s for 2 GB. They are not mapped for
    that, so they take no memory. Those that another rank has hashed on the same file system (`known`) are not read.
    """
    for name, file in files.items():
        path = directory / name
        if not os.path.isfile(path):
            raise damaged(path, "not an ordinary file" if os.path.lexists(path) else "missing")
        if path.stat().st_size != file["bytes"]:
            raise damaged(path, f"{path.stat().st_size} bytes, not {file['bytes']}")
    for name, file in files.items():
        path = directory / name
        if known and name in known and [*_version(path)[1:]] == known[name][:-1]:
            _largest_ids[_version(path)] = known[name][-1]
        elif name.endswith((".bin", ".npy")):
            sha256 = _read_through(path) if name.endswith(".bin") else sources.sha256(path)
            if sha256 != file["sha256"]:
                raise damaged(path, "sha256 differs")


def seen(directory: Path, files: Iterable[str]) -> Seen:
    """What ranks need not find out again about token files that are as they were written, if they see the same files:
    a copy has another inode."""
    paths = [directory / name for name in files if name.endswith((".bin", ".npy"))]
    return {path.name: [*_version(path)[1:], _largest(path) if path.suffix == ".bin" else 0] for path in paths}


_largest_ids: dict[tuple[Any, ...], int] = {}  # of the token files that were read, by `_version`


def largest_id(directory: Path, split: str) -> int:
    """The largest id of a split, 0 if it is empty; known if `check` has read the file, which is not mapped for it."""
    return _largest(directory / names(split)[0])


def _largest(path: Path) -> int:
    if _version(path) not in _largest_ids:
        _read_through(path)
    return _largest_ids[_version(path)]


def _version(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def _read_through(path: Path) -> str:
    """The sha256 of a token file; its largest id is remembered."""
    version, dtype, digest, largest = _version(path), np.dtype(_dtype(path, _size(path))), hashlib.sha256(), 0
    with sources.reading(path), open(path, "rb") as file:
        while content := file.read(2**18):
            digest.update(content)
            largest = max(largest, int(np.frombuffer(content, dtype, len(content) // dtype.itemsize).max(initial=0)))
    _largest_ids[version] = largest
    return digest.hexdigest()


def damaged(path: Path, reason: str) -> UserError:
    """What is said of a file of prepared data that is not as it was written."""
    reason = " ".join(reason.split())[:160]
    return UserError(f"{escape(path.name)} damaged ({escape(reason)})", str(path.parent), REMEDY)
