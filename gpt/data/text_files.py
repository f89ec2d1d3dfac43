"""Reads files as strict UTF-8 text, gzipped or not, by rows or by pieces, in memory bounded by their length."""

import codecs
import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt.errors import ENVIRONMENT, UserError
from gpt.terminal.console import escape

PIECE = 64 << 10  # bytes of running text that are read at a time; 1 MiB is no faster, and malloc keeps 40 MB for it
BUFFER = 64 << 10  # bytes
ROW_LIMIT = 64 << 20  # bytes: a quote that is never closed must not draw the rest of a large file into memory


class BadLine(Exception):
    """What is wrong with a line of a file, such as a byte that is no text."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


class TextFile:
    """A file as text, by rows or by pieces. Raises BadLine for what is not UTF-8 or a NUL; rows can go on after it."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.first = 1  # the line where the row that was read last starts
        self.quotes = 0  # in that row
        self._lines = 0  # line ends read
        self.n_bytes = 0  # that were read; in a gzipped file, after decompression
        self._cut = b""  # the first bytes of a character whose others are in the next piece

    def row(self, multiline: bool = False) -> str:
        """The next line with its line end, "" after the last one. With `multiline` a line end between quotes does not
        end the row."""
        parts: list[str] = []
        self.first, self.quotes, start = self._lines + 1, 0, self.n_bytes
        while not parts or (multiline and self.quotes % 2):
            raw = self.file.readline(ROW_LIMIT + 1)
            if not raw:
                break
            if self.n_bytes + len(raw) - start > ROW_LIMIT:
                raise UserError(
                    f"{escape(str(self.path))}:{self.first}: this row does not end within {ROW_LIMIT:,} bytes",
                    remedy="is a quote never closed? If not, cut the row into several",
                )
            self.quotes += raw.count(b'"')
            parts.append(self._decode(raw, is_end=True)[0])
        return "".join(parts)

    def read(self, size: int) -> str:
        """The next `size` bytes, or the rest when that is -1; "" at the end."""
        new = self.file.read(size)
        raw = self._cut + new
        text, used = self._decode(raw, is_end=len(new) != size)
        self._cut = raw[used:]
        return text

    def characters(self) -> Iterator[str]:
        """The rest of the file in pieces, its line ends as \\n."""
        held = ""  # a carriage return whose line feed may come with the next piece
        while piece := self.read(PIECE):
            piece = held + piece
            held = "\r" if piece.endswith("\r") else ""
            yield piece[: len(piece) - len(held)].replace("\r\n", "\n")
        if held:
            yield held

    def _decode(self, raw: bytes, is_end: bool) -> tuple[str, int]:
        """Text and the number of bytes that it took: all, unless a character is cut at an end that is not the last."""
        start, line, mark = self.n_bytes, self._lines + 1, 0
        if start == 0:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:2]:
                raise UserError(f"{escape(str(self.path))} is UTF-16", remedy="save it as UTF-8")
            mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
        self._lines += raw.count(b"\n")
        self.n_bytes += len(raw)
        at = raw.find(b"\0")
        if at >= 0:
            raise BadLine(line + raw.count(b"\n", 0, at), f"NUL character at byte {start + at} of the file")
        try:
            text, used = codecs.utf_8_decode(raw[mark:], "strict", is_end)
        except UnicodeDecodeError as error:
            at = mark + error.start
            problem = f"not UTF-8 at byte {start + at} of the file: 0x{raw[at]:02x}"
            raise BadLine(line + raw.count(b"\n", 0, at), problem) from None
        self.n_bytes += mark + used - len(raw)
        return text, mark + used


class _HashedFile(io.FileIO):
    """A file whose bytes, read from first to last, are hashed on their way."""

    def __init__(self, path: Path, digest: Any) -> None:
        super().__init__(path)
        self.digest = digest

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        self.digest.update(memoryview(buffer)[:size])
        return size


@contextlib.contextmanager
def open_text(path: Path, digest: Any = None) -> Iterator[TextFile]:
    """Errors of the file system, of decompression and of decoding become UserErrors, also while the file is read.

    `digest`, an object of hashlib, is given the bytes of the file, which in a gzipped one are the compressed ones.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = io.FileIO(path) if digest is None else _HashedFile(path, digest)
            file: Any = stack.enter_context(io.BufferedReader(raw, BUFFER))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file)))
            yield TextFile(path, file)
    except BadLine as error:
        raise UserError(f"{escape(str(path))}:{error.line}: {escape(str(error))}", remedy="correct it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{escape(str(path))} is damaged: {error}", remedy="get the file again") from error
    except OSError as error:
        raise UserError(f"cannot read {escape(str(path))}", error.strerror or str(error), code=ENVIRONMENT) from error


def read_text(path: Path) -> str:
    """A whole text file, its line ends as \\n. Raises UserError."""
    with open_text(path) as file:
        return "".join(file.characters())


def measure(path: Path) -> tuple[int, str]:
    """The number of characters of a text file, a line end being one, and its sha256. Raises UserError."""
    digest = hashlib.sha256()
    with open_text(path, digest) as file:
        n_chars = sum(map(len, file.characters()))
    return n_chars, digest.hexdigest()


def portions(path: Path, sizes: Sequence[int], sha256: str) -> Iterator[Iterator[str]]:
    """A text file cut into portions of so many characters, which are all of it; each comes in pieces and must be read
    to its end before the next. Raises UserError when the file is no longer what it was when it was measured."""
    digest = hashlib.sha256()
    with open_text(path, digest) as file:
        chunks, rest = file.characters(), ""

        def portion(size: int) -> Iterator[str]:
            nonlocal rest
            while size and (rest := rest or next(chunks, "")):
                piece, rest = rest[:size], rest[size:]
                size -= len(piece)
                yield piece

        yield from map(portion, sizes)
        for _ in chunks:  # to the end of the file, for its hash
            pass
    if digest.hexdigest() != sha256:
        raise UserError(f"{escape(str(path))} was changed while it was read", remedy="start again")


def shorten(text: str, length: int = 40) -> str:
    """For messages: the beginning of a text that may have any length."""
    return text if len(text) <= length else text[:length] + "..."
