"""Reads TensorFlow checkpoints without TensorFlow: its tensor bundles, in which OpenAI published GPT-2.

`model.ckpt.index` is a table in LevelDB's format: blocks of sorted keys and values, an index of the blocks, a footer.
Under the empty key it holds a BundleHeaderProto, under each variable's name a BundleEntryProto, which says where in
`model.ckpt.data-00000-of-00001` the variable's bytes lie. Each block and each variable has a checksum, a CRC-32C.
Sources: tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/lib/io/format.cc, LevelDB's doc/table_format.md.
"""

import itertools
import math
import mmap
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import torch
from torch import Tensor

from gpt.errors import unusable
from gpt.files import tensor_files

# By TensorFlow's number of the type; the names are for people.
TYPES = {1: torch.float32, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
OTHER_TYPES = {2: "float64", 4: "uint8", 5: "int16", 6: "int8", 7: "string", 10: "bool"}
MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a table
FOOTER = 48  # bytes at a table's end: where its index of blocks lies, zeros, the magic
TRAILER = 5  # bytes after a block: how it is compressed, its checksum
NO_COMPRESSION, SNAPPY = 0, 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field of a protocol buffer is written
LARGEST_INDEX = 2**20  # bytes; that of GPT-2 XL has less than 2**15
LONGEST_NAME = 1000  # bytes
PIECE = 2**24  # bytes of a variable that are in memory at once while its checksum is computed

Fields = defaultdict[tuple[int, int], list]  # (number, how it is written) -> a field's values in a protocol buffer
Handle = tuple[int, int]  # offset and size of a block, in bytes


@dataclass(frozen=True)
class Entry:
    """A variable: what it is, and which bytes of which data file are its values."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    shard: int
    offset: int
    size: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.size


def prefix_of(directory: Path) -> Path | None:
    """What the names of a checkpoint's files begin with: what the file `checkpoint` says, else as the only one has it.

    None if there is no checkpoint, or several of which none is named. Raises UserError (3).
    """
    state, text = directory / "checkpoint", ""
    try:
        if state.is_file():  # reading from a pipe would wait
            with state.open("rb") as file:
                text = file.read(2**16).decode(errors="replace")
        indexes = [path for path in directory.glob("?*.index") if path.is_file()]
    except OSError as error:
        raise unusable(state, error.strerror) from error
    named = re.search(r'^model_checkpoint_path: *"([^"/\\\0]+)"', text, re.M)  # a name, not a path to elsewhere
    if named and named[1] not in (".", ".."):
        return directory / named[1]
    return indexes[0].with_suffix("") if len(indexes) == 1 else None


def read(prefix: Path) -> dict[str, Tensor]:
    """name -> tensor, mapped from the data files, once all checksums have been verified. Raises UserError (3).

    `prefix` is what the names of the checkpoint's files begin with: gpt2/355M/model.ckpt.
    """
    path, tensors = Path(f"{prefix}.index"), {}
    try:
        n_shards, entries = _contents(_read_index(path))
        for shard, its_entries in itertools.groupby(entries, key=lambda entry: entry.shard):
            path = Path(f"{prefix}.data-{shard:05d}-of-{n_shards:05d}")
            data = _mapped(path)
            tensors |= {entry.name: _tensor(data, entry) for entry in its_entries}
    except OSError as error:
        raise unusable(path, error.strerror) from error
    except ValueError as error:
        raise unusable(path, str(error)) from error
    return dict(sorted(tensors.items()))


def _read_index(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("no such file")
    with path.open("rb") as file:
        table = file.read(LARGEST_INDEX + 1)
    if len(table) > LARGEST_INDEX:
        raise ValueError(f"more than {LARGEST_INDEX:,} bytes")
    return table


def _mapped(path: Path) -> Tensor:
    """The bytes of a file; who writes to them does not write to the file."""
    if not path.is_file():
        raise ValueError("no such file")
    if not path.stat().st_size:  # cannot be mapped
        return torch.empty(0, dtype=torch.uint8)
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _tensor(data: Tensor, entry: Entry) -> Tensor:
    """A variable among the bytes of its data file, once its checksum has been verified."""
    if entry.end > len(data):
        raise ValueError(f"{len(data):,} bytes, {entry.name} ends at {entry.end:,}")
    crc, raw = 0, data[entry.offset : entry.end]
    for piece in raw.split(PIECE):
        crc = google_crc32c.extend(crc, piece.numpy())
        tensor_files.forget(piece)
    if _masked(crc) != entry.crc:
        raise ValueError(f"{entry.name}: crc32c differs")
    if entry.offset % entry.dtype.itemsize:  # variables of several types follow each other without a gap
        copy = mmap.mmap(-1, entry.size)  # shared memory, which `forget` leaves as it is
        copy.write(raw.numpy())
        raw = torch.frombuffer(copy, dtype=torch.uint8)
    return raw.view(entry.dtype).view(entry.shape)


def _contents(table: bytes) -> tuple[int, list[Entry]]:
    """The number of data files, and the variables in the order of their bytes. Raises ValueError, as all below do."""
    pairs = _pairs(table)
    key, value = next(pairs, (None, b""))
    if key != b"":
        raise ValueError("no header")
    header = _fields(value)
    if _number(header, 2):
        raise ValueError("written by a big-endian machine, which is not supported")
    if any(_number(_fields(version), 2) > 1 for version in header[3, BYTES]):
        raise ValueError("written by a newer TensorFlow, for readers of a later format than 1")
    n_shards = _number(header, 1)
    entries = sorted((_entry(*pair, n_shards) for pair in pairs), key=lambda entry: (entry.shard, entry.offset))
    for one, other in itertools.pairwise(entries):  # what overlaps would be read again and again
        if one.shard == other.shard and one.end > other.offset:
            raise ValueError(f"{one.name} and {other.name} overlap")
    return n_shards, entries


def _entry(key: bytes, value: bytes, n_shards: int) -> Entry:
    name, fields = key.decode(errors="backslashreplace"), _fields(value)
    if fields[7, BYTES] or key[0] == 0:  # the names of slices begin with a zero
        raise ValueError(f"{name}: a variable in slices, which is not supported")
    if name.encode() != key:
        raise ValueError(f"{name}: a name that is not UTF-8")
    kind, shard, offset, size = (_number(fields, number) for number in (1, 3, 4, 5))
    if kind not in TYPES:
        raise ValueError(f"{name}: type {OTHER_TYPES.get(kind, f'number {kind}')}, which is not supported")
    shapes = [_fields(shape) for shape in fields[2, BYTES]]
    shape = [_number(_fields(length), 1) for fields in shapes for length in fields[2, BYTES]]
    if any(_number(fields, 3) for fields in shapes) or len(shape) > 8 or 0 in shape:
        raise ValueError(f"{name}: a shape that is unknown, empty or of more than 8 dimensions")
    if math.prod(shape) * TYPES[kind].itemsize != size:
        raise ValueError(f"{name}: {size:,} bytes for shape {shape}")
    if shard >= n_shards:
        raise ValueError(f"{name}: in data file {shard} of {n_shards}, counted from 0")
    return Entry(name, TYPES[kind], shape, shard, offset, size, _number(fields, 6, FIXED32))


def _pairs(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys of a table, each greater than the one before, and their values.

    All blocks must follow each other as TensorFlow writes them: no byte goes unverified, no block is read twice.
    """
    if len(table) < FOOTER or not table.endswith(MAGIC):
        raise ValueError(f"{len(table):,} bytes that do not end as TensorFlow's index files do")
    body, footer = table[:-FOOTER], table[-FOOTER : -len(MAGIC)]
    meta, at = _handle(footer, 0)
    index, at = _handle(footer, at)
    if any(footer[at:]):
        raise ValueError("not zero where nothing is stored")
    blocks = [_handle(value, 0)[0] for _, value in _block_pairs(_block(body, index))]
    end = 0
    for offset, size in [*blocks, meta, index]:
        if offset != end:
            raise ValueError(f"no block begins at {end}")
        end = offset + size + TRAILER
    if end != len(body):
        raise ValueError(f"its blocks end at {end}, not at {len(body)}")
    _block(body, meta)
    last = None
    for block in blocks:
        for key, value in _block_pairs(_block(body, block)):
            if last is not None and key <= last:
                raise ValueError("its names are not in order")
            yield key, value
            last = key


def _block(body: bytes, handle: Handle) -> bytes:
    offset, size = handle
    trailer, _ = _cut(body, offset + size, TRAILER)
    if _masked(google_crc32c.value(body[offset : offset + size + 1])) != int.from_bytes(trailer[1:], "little"):
        raise ValueError(f"crc32c of its block at {offset} differs")
    if trailer[0] != NO_COMPRESSION:
        how = "compressed with Snappy" if trailer[0] == SNAPPY else f"compressed in way {trailer[0]}"
        raise ValueError(f"its block at {offset} is {how}, which is not supported")
    return body[offset : offset + size]


def _block_pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Of each key only that is stored which differs from the key before; at the end is a list of whole keys."""
    size, _ = _cut(block, len(block) - 4, 4)
    end = len(block) - 4 * (int.from_bytes(size, "little") + 1)
    if end < 0:
        raise ValueError("a block is shorter than the list at its end")
    entries, at, key = block[:end], 0, b""
    while at < end:
        shared, at = _varint(entries, at)
        own, at = _varint(entries, at)
        size, at = _varint(entries, at)
        if shared > len(key) or shared + own > LONGEST_NAME:
            raise ValueError("a name shares more than there is, or is too long")
        suffix, at = _cut(entries, at, own)
        value, at = _cut(entries, at, size)
        key = key[:shared] + suffix
        yield key, value


def _handle(data: bytes, at: int) -> tuple[Handle, int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _fields(message: bytes) -> Fields:
    """The fields of a protocol buffer."""
    fields, at = Fields(list), 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, how = tag >> 3, tag & 7
        if how == VARINT:
            value, at = _varint(message, at)
        elif how == BYTES:
            size, at = _varint(message, at)
            value, at = _cut(message, at, size)
        elif how in (FIXED32, FIXED64):
            raw, at = _cut(message, at, 4 if how == FIXED32 else 8)
            value = int.from_bytes(raw, "little")
        else:
            raise ValueError("not a protocol buffer")
        fields[number, how].append(value)
    return fields


def _number(fields: Fields, number: int, how: int = VARINT) -> int:
    """A number in a protocol buffer: the last that is given for a field, 0 if none is."""
    return fields[number, how][-1] if fields[number, how] else 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, 7 in each byte, and where the next thing begins."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128 and value < 2**64 and (byte or not i):  # a zero at the end would be a longer form than needed
            return value, at + i + 1
        if byte < 128:
            break
    raise ValueError("a number is cut off or has more than 64 bits")


def _cut(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    """`size` bytes, and where the next thing begins."""
    if not 0 <= at <= at + size <= len(data):
        raise ValueError("cut off")
    return data[at : at + size], at + size


def _masked(crc: int) -> int:
    """As LevelDB and TensorFlow store checksums, so that a checksum of data with checksums remains a good one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
