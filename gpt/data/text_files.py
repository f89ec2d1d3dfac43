"""Reads files as strict UTF-8 text, gzipped or not, by rows or by pieces, in memory bounded by their length."""

import codecs
import contextlib
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data import unread_formats
from gpt.errors import ENVIRONMENT, UserError
from gpt.terminal.console import escape

PIECE = 64 << 10  # bytes of running text that are read at a time; 1 MiB is no faster, and malloc keeps 40 MB for it
BUFFER = 64 << 10  # bytes
END_OF_TEXT = "<|endoftext|>"  # what many files of texts have between documents
ROW_LIMIT = 64 << 20  # bytes: a quote that is never closed must not draw the rest of a large file into memory


# The error handler of _Recoded: what an encoding cannot read becomes a byte that no UTF-8 text has.
codecs.register_error("gpt_invalid", lambda error: ("\udcff", error.end))


class BadLine(Exception):
    """What is wrong with a line of a file, such as a byte that is no text."""

    def __init__(self, line: int, problem: str, remedy: str = "correct it") -> None:
        super().__init__(problem)
        self.line, self.remedy = line, remedy


class TextFile:
    """A file as text, by rows or by pieces. Raises BadLine for what is not UTF-8 or a NUL; rows can go on after it.

    `file` gives UTF-8, also where the file itself is in another `encoding`."""

    def __init__(self, path: Path, file: Any, encoding: str | None = None) -> None:
        self.path, self.file, self.encoding = path, file, encoding
        self.first = 1  # the line where the row that was read last starts
        self.quotes, self.raw = 0, b""  # in that row
        self._lines = 0  # line ends read
        self.n_bytes = 0  # that were read; in a gzipped file, after decompression
        # Whether a character of several bytes was read, which other encodings hardly ever make up.
        self._is_utf8 = False
        self._cut = b""  # the first bytes of a character whose others are in the next piece

    def row(self, multiline: bool = False) -> str:
        """The next line with its line end, "" after the last one. With `multiline` a line end between quotes does not
        end the row. Its bytes are in `raw`, also where they are no text."""
        parts: list[bytes] = []
        self.first, self.quotes, n_bytes = self._lines + 1, 0, 0
        while not parts or (multiline and self.quotes % 2):
            raw = self.file.readline(ROW_LIMIT + 1)
            if not raw:
                break
            n_bytes += len(raw)
            if n_bytes > ROW_LIMIT:
                raise UserError(
                    f"{escape(str(self.path))}:{self.first}: this row does not end within {ROW_LIMIT:,} bytes",
                    remedy="is a quote never closed? If not, cut the row into several",
                )
            self.quotes += raw.count(b'"')
            parts.append(raw)
        self.raw = b"".join(parts) if len(parts) > 1 else parts[0] if parts else b""
        return self._decode(self.raw, is_end=True)[0]

    def read(self, size: int) -> str:
        """The next `size` bytes, or the rest when that is -1; "" at the end."""
        new = self.file.read(size)
        raw = self._cut + new
        text, used = self._decode(raw, is_end=len(new) != size)
        self._cut = raw[used:]
        return text

    def characters(self, separator: str | None = None) -> Iterator[str]:
        """The rest of the file in pieces, its line ends as \\n; each `separator` of documents, with the line ends
        around it, as DOCUMENT_END, which no text has."""
        pieces = self._pieces()
        yield from pieces if separator is None else _marked(pieces, separator)

    def _pieces(self) -> Iterator[str]:
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
                remedy = "save it as UTF-8, or, where it is data, set data.encoding=utf-16"
                raise UserError(f"{escape(str(self.path))} is UTF-16", remedy=remedy)
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
            self._is_utf8 |= not raw[mark:at].isascii()
            raise BadLine(line + raw.count(b"\n", 0, at), *self._not_text(raw[at], start + at)) from None
        self._is_utf8 |= not raw[mark:].isascii()
        self.n_bytes += mark + used - len(raw)
        return text, mark + used

    def _not_text(self, byte: int, at: int) -> tuple[str, str]:
        """What is wrong with a byte, and what to do."""
        if self.encoding:
            return f"a byte that is not in {self.encoding}", "correct it, or set another data.encoding"
        problem = f"not UTF-8 at byte {at} of the file: 0x{byte:02x}"
        character = bytes([byte]).decode("windows-1252", "replace")
        if character == "\ufffd" or self._is_utf8:
            return problem, "correct it"
        remedy = "save it as UTF-8, or, where it is data, set data.encoding=windows-1252"
        return f"{problem}, in Windows-1252 {character}", remedy


DOCUMENT_END = "\0"


def _marked(pieces: Iterator[str], separator: str) -> Iterator[str]:
    """Pieces of text with a DOCUMENT_END for each separator, the line ends around it included."""
    pattern = re.compile(rf"\n*(?:{re.escape(separator)}|\0)\n*")
    text = ""
    for piece in pieces:
        text = pattern.sub(DOCUMENT_END, text + piece)
        safe = len(text[: max(0, len(text) - len(separator) + 1)].rstrip(f"\n{DOCUMENT_END}"))
        yield text[:safe]
        text = text[safe:]
    yield pattern.sub(DOCUMENT_END, text)


class _Recoded(io.RawIOBase):
    """A file in another encoding, as UTF-8."""

    def __init__(self, file: Any, encoding: str) -> None:
        self.file, self.decoder, self.held = file, codecs.getincrementaldecoder(encoding)("gpt_invalid"), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_end = False
        while not self.held and not is_end:
            raw = self.file.read(PIECE)
            is_end = not raw
            self.held = self.decoder.decode(raw, is_end).encode("utf-8", "surrogateescape")
        size = min(len(buffer), len(self.held))
        buffer[:size], self.held = self.held[:size], self.held[size:]
        return size


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
def open_text(path: Path, digest: Any = None, encoding: str | None = None) -> Iterator[TextFile]:
    """Errors of the file system, of decompression and of decoding become UserErrors, also while the file is read, and
    so do files of other formats than text. `encoding` None is UTF-8.

    `digest`, an object of hashlib, is given the bytes of the file, which in a gzipped one are the compressed ones.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = io.FileIO(path) if digest is None else _HashedFile(path, digest)
            file: Any = stack.enter_context(io.BufferedReader(raw, BUFFER))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file)))
            unread_formats.refuse(path, file.peek(unread_formats.N_BYTES)[: unread_formats.N_BYTES])
            if encoding is not None and codecs.lookup(encoding).name == "utf-8":
                encoding = None
            if encoding is not None and encoding != "utf-8-sig" and file.peek(3)[:3] == codecs.BOM_UTF8:
                raise UserError(f"{escape(str(path))} begins with the mark of UTF-8", remedy="leave out data.encoding")
            if encoding is not None:
                file = io.BufferedReader(_Recoded(file, encoding), BUFFER)
            yield TextFile(path, file, encoding)
    except BadLine as error:
        raise UserError(f"{escape(str(path))}:{error.line}: {escape(str(error))}", remedy=error.remedy) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{escape(str(path))} is damaged: {error}", remedy="get the file again") from error
    except OSError as error:
        raise UserError(f"cannot read {escape(str(path))}", error.strerror or str(error), code=ENVIRONMENT) from error


def read_text(path: Path) -> str:
    """A whole text file, its line ends as \\n. Raises UserError."""
    with open_text(path) as file:
        return "".join(file.characters())


class Measured(NamedTuple):
    """The size of a text file in characters, a line end or a separator of documents being one, how often END_OF_TEXT
    and separators of documents occur, and its sha256."""

    n_chars: int
    n_marks: int
    n_separators: int
    sha256: str


def measure(path: Path, encoding: str | None = None, separator: str | None = None) -> Measured:
    """Reads a text file once. Raises UserError."""
    digest, held, n_chars, n_marks, n_separators = hashlib.sha256(), "", 0, 0, 0
    with open_text(path, digest, encoding) as file:
        for piece in file.characters(separator):
            n_chars += len(piece)
            n_separators += piece.count(DOCUMENT_END)
            n_marks += (held + piece).count(END_OF_TEXT)
            held = (held + piece)[1 - len(END_OF_TEXT) :]
    return Measured(n_chars, n_marks, n_separators, digest.hexdigest())


def portions(
    path: Path, sizes: Sequence[int], sha256: str, encoding: str | None = None, separator: str | None = None
) -> Iterator[Iterator[str]]:
    """A text file cut into portions of so many characters, which are all of it; each comes in pieces and must be read
    to its end before the next. Raises UserError when the file is no longer what it was when it was measured."""
    digest = hashlib.sha256()
    with open_text(path, digest, encoding) as file:
        chunks, rest = file.characters(separator), ""

        def portion(size: int) -> Iterator[str]:
            nonlocal rest
            while size and (rest := rest or next(filter(None, chunks), "")):
                piece, rest = rest[:size], rest[size:]
                size -= len(piece)
                yield piece

        yield from map(portion, sizes)
        for _ in chunks:  # to the end of the file, for its hash
            pass
    if digest.hexdigest() != sha256:
        raise UserError(f"{escape(str(path))} was changed while it was read", remedy="start again")


def documents(pieces: Iterator[str]) -> Iterator[Iterator[str]]:
    """Running text cut at each DOCUMENT_END; each document comes in pieces and must be read before the next."""
    rest: str | None = ""

    def document() -> Iterator[str]:
        nonlocal rest
        while rest is not None:
            text, end, after = rest.partition(DOCUMENT_END)
            rest = after if end else next(pieces, None)
            if text:
                yield text
            if end:
                return

    while rest is not None:
        yield document()


def shorten(text: str, length: int = 40) -> str:
    """For messages: the beginning of a text that may have any length."""
    return text if len(text) <= length else text[:length] + "..."
