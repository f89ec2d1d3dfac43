"""TensorFlow's checkpoints: read as TensorFlow reads them, refused where a byte is not as TensorFlow wrote it."""

import hashlib
import json
import os
import re
import shutil
import struct
import warnings
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_batching import resident_kb
from test_hostile_files import resident

from gpt.errors import UserError
from gpt.files import tensor_files
from gpt.weights import tf_bundle

GOLDEN = ROOT / "tests" / "golden" / "tensorflow"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
MAGIC = 0xDB4775248B80FB57
EXHAUSTIVE = pytest.mark.exhaustive


def refused(prefix: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        tf_bundle.read(prefix)
    assert caught.value.code == 3 and caught.value.where == str(prefix.parent) and "\n" not in str(caught.value)
    return caught.value


def copied(name: str, to: Path) -> Path:
    """The prefix of a copy of a checkpoint that TensorFlow wrote."""
    return shutil.copytree(GOLDEN / name, to / name) / "model.ckpt"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# A writer of bundles, as far as the tests need one: it writes what TensorFlow would not.


def varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def field(number: int, value: int | bytes) -> bytes:
    """Of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def header(shards: int = 1, endianness: int = 0, min_consumer: int = 0) -> bytes:
    return field(1, shards) + field(2, endianness) + field(3, field(1, 1) + field(2, min_consumer))


def shaped(*lengths: int) -> bytes:
    return b"".join(field(2, field(1, length)) for length in lengths)


def entry(shape: bytes = shaped(4), offset: int = 0, size: int = 16, dtype: int = 1, shard: int = 0, more=b"") -> bytes:
    """The bytes of all variables are zeros; of one that no memory can hold the checksum is wrong."""
    crc = varint(6 << 3 | 5) + masked(bytes(size if size < 2**30 else 0))
    return field(1, dtype) + field(2, shape) + field(3, shard) + field(4, offset) + field(5, size) + crc + more


def stored(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return varint(shared) + varint(len(key)) + varint(len(value)) + key + value


def sealed(entries: bytes, kind: int = 0, restarts: bytes = struct.pack("<II", 0, 1)) -> bytes:
    """A block."""
    content = entries + restarts + bytes([kind])
    return content + masked(content)


def table(*blocks: bytes, order: list[int] | None = None, gap: bytes = b"") -> bytes:
    body, handles = b"", []
    for block in blocks:
        handles.append(varint(len(body)) + varint(len(block) - 5))
        body += block
    index = sealed(b"".join(stored(b"%d" % i, handles[j]) for i, j in enumerate(order or range(len(blocks)))))
    body += gap
    meta = sealed(b"")
    footer = varint(len(body)) + varint(len(meta) - 5) + varint(len(body + meta)) + varint(len(index) - 5)
    return body + meta + index + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def written(directory: Path, index: bytes, data: bytes = bytes(64)) -> Path:
    (directory / INDEX).write_bytes(index)
    (directory / DATA).write_bytes(data)
    return directory / "model.ckpt"


def one_block(*pairs: tuple[bytes, bytes], **head: int) -> bytes:
    return table(sealed(b"".join(stored(*pair) for pair in [(b"", header(**head)), *pairs])))


@pytest.mark.parametrize(("name", "n_variables", "n_types"), [("tiny", 28, 1), ("sharded", 11, 5)])
def test_every_variable_equals_what_tensorflow_read_back(name, n_variables, n_types):
    expected = json.loads((GOLDEN / "expected.json").read_text())[name]
    with warnings.catch_warnings(action="error"):
        tensors = tf_bundle.read(tf_bundle.prefix_of(GOLDEN / name))
    assert list(tensors) == list(expected) and len(expected) == n_variables
    for key, tensor in tensors.items():
        found = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": digest(tensor),
        }
        assert found == expected[key], key
    assert len({tensor.dtype for tensor in tensors.values()}) == n_types


def test_several_blocks_and_names_that_share_their_beginning_are_read(tmp_path):
    first = stored(b"", header()) + stored(b"model/a", entry()) + stored(b"b", entry(shaped(2, 2), 16), len("model/"))
    prefix = written(tmp_path, table(sealed(first), sealed(stored(b"model/c", entry(b"", 32, 4)))))
    tensors = tf_bundle.read(prefix)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "model/a": [4], "model/b": [2, 2], "model/c": []
    }  # fmt: skip


def test_variables_of_several_types_without_gaps_are_aligned_and_survive_forgetting():
    tensors = tf_bundle.read(GOLDEN / "sharded" / "model.ckpt")
    before = {name: digest(tensor) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0
        tensor_files.forget(tensor)
    assert before == {name: digest(tensor) for name, tensor in tensors.items()}


def test_a_copied_variable_of_many_pages_survives_forgetting(tmp_path):
    values = np.arange(10_000)
    data = bytes(4) + values.tobytes()
    crc = varint(6 << 3 | 5) + masked(data[4:])
    value = field(1, 9) + field(2, shaped(10_000)) + field(4, 4) + field(5, 80_000) + crc
    tensor = tf_bundle.read(written(tmp_path, one_block((b"x", value)), data))["x"]
    tensor_files.forget(tensor)
    assert torch.equal(tensor, torch.from_numpy(values))


@pytest.mark.parametrize(
    ("name", "whole"), [("tiny", False), *(pytest.param(n, True, marks=EXHAUSTIVE) for n in ("tiny", "sharded"))]
)
def test_a_flipped_bit_anywhere_in_an_index_is_refused(tmp_path, record_property, name, whole):
    prefix = copied(name, tmp_path)
    path = Path(f"{prefix}.index")
    good, by_checksum = path.read_bytes(), 0
    blocks = len(good) - tf_bundle.FOOTER  # all bits of the footer, which has no checksum; else one of each byte or all
    bits = [bit for bit in range(8 * len(good)) if whole or bit // 8 >= blocks or bit % 8 == bit // 8 % 8]
    for bit in bits:
        path.write_bytes(flipped(good, bit))
        what = refused(prefix).what
        assert what.startswith(f"{INDEX} damaged ("), (bit, what)
        assert bit // 8 >= blocks or "crc32c" in what, (bit, what)
        by_checksum += "crc32c" in what
    assert by_checksum >= blocks and len(bits) >= blocks + 8 * tf_bundle.FOOTER
    record_property("count", f"{len(bits)} flipped bits of {name}/{INDEX}: {by_checksum} by a checksum, 0 accepted")


def test_every_flipped_bit_of_the_data_is_refused_and_its_variable_named(tmp_path, record_property):
    prefix = copied("tiny", tmp_path)
    path = tmp_path / "tiny" / DATA
    good, tensors = path.read_bytes(), tf_bundle.read(prefix)
    start = min(tensor.data_ptr() for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(good)  # no byte is without a variable
    owner = np.empty(len(good), object)
    for name, tensor in tensors.items():
        owner[tensor.data_ptr() - start : tensor.data_ptr() - start + tensor.nbytes] = name
    edges = [8 * at for at in range(1, len(good)) if owner[at] != owner[at - 1]]
    bits = [0, 8 * len(good) - 1, *edges, *(edge - 1 for edge in edges)]
    bits += np.random.default_rng(0).integers(0, 8 * len(good), 100).tolist()
    for bit in bits:
        path.write_bytes(flipped(good, bit))
        assert refused(prefix).what == f"{DATA} damaged ({owner[bit // 8]}: crc32c differs)", bit
    record_property("count", f"{len(bits)} flipped bits of tiny/{DATA}: all refused, each by its variable's name")


def test_a_file_cut_off_anywhere_is_refused(tmp_path, record_property):
    prefix = copied("tiny", tmp_path)
    index, data = Path(f"{prefix}.index"), tmp_path / "tiny" / DATA
    good = index.read_bytes()
    for length in range(len(good)):
        index.write_bytes(good[:length])
        assert refused(prefix).what.startswith(f"{INDEX} damaged ({length:,} bytes that do not end as")
    index.write_bytes(good)
    whole = data.read_bytes()
    lengths = [*range(0, len(whole), 999), len(whole) - 1]
    for length in lengths:
        data.write_bytes(whole[:length])
        found, needed = re.search(
            rf"{DATA} damaged \(([\d,]+) bytes, \S+ ends at ([\d,]+)\)", refused(prefix).what
        ).groups()
        assert int(found.replace(",", "")) == length < int(needed.replace(",", "")) <= len(whole)
    record_property("count", f"cut off at {len(good)} lengths of the index and {len(lengths)} of the data: all refused")


@pytest.mark.parametrize("missing", [INDEX, "model.ckpt.data-00000-of-00002", "model.ckpt.data-00001-of-00002"])
@pytest.mark.parametrize("instead", [None, Path.mkdir, os.mkfifo])
def test_a_missing_file_is_named(tmp_path, missing, instead):
    prefix = copied("sharded", tmp_path)
    path = prefix.parent / missing
    path.unlink()
    if instead:
        instead(path)
    assert refused(prefix).what == f"{missing} damaged (no such file)"


NAMED = 'model_checkpoint_path: "{}"\nall_model_checkpoint_paths: "other"\n'


@pytest.mark.parametrize(
    ("text", "indexes", "found"),
    [
        (NAMED.format("model.ckpt"), ["model.ckpt", "model.ckpt-7"], "model.ckpt"),
        (NAMED.format("model.ckpt-7"), ["model.ckpt", "model.ckpt-7"], "model.ckpt-7"),
        (NAMED.format("model.ckpt"), [], "model.ckpt"),  # not there: `read` says so
        (None, ["model-332"], "model-332"),
        (None, [], None),
        (None, ["a", "b"], None),
        (NAMED.format("/tmp/model.ckpt"), ["a"], "a"),
        (NAMED.format("../model.ckpt"), ["a", "b"], None),
        (NAMED.format("below/model.ckpt"), [], None),
        (NAMED.format(".."), [], None),
        (NAMED.format(r"\056\056\057model.ckpt"), [], None),
        (NAMED.format(""), ["a"], "a"),
        ("\0\xff" * 1000, ["a"], "a"),
    ],
)
def test_a_checkpoint_is_found_in_its_directory_and_never_elsewhere(tmp_path, text, indexes, found):
    if text is not None:
        (tmp_path / "checkpoint").write_text(text, encoding="latin-1")
    for name in indexes:
        (tmp_path / f"{name}.index").touch()
    assert tf_bundle.prefix_of(tmp_path) == (found and tmp_path / found)


def test_what_is_called_checkpoint_may_be_anything(tmp_path):
    assert tf_bundle.prefix_of(tmp_path / "missing") is None
    os.mkfifo(tmp_path / "checkpoint")
    (tmp_path / "directory.index").mkdir()
    assert tf_bundle.prefix_of(tmp_path) is None


UNSUPPORTED = {
    "compressed with Snappy": table(sealed(stored(b"", header()), kind=1)),
    "compressed in way 2": table(sealed(stored(b"", header()), kind=2)),
    "big-endian machine": one_block(endianness=1),
    "newer TensorFlow": one_block(min_consumer=2),
    "x: type string": one_block((b"x", entry(dtype=7))),
    "x: type number 99": one_block((b"x", entry(dtype=99))),
    "x: a variable in slices": one_block((b"x", entry(more=field(7, b"")))),
    "\0\1x: a variable in slices": one_block((b"\0\1x", entry())),
    "x: a shape that is unknown": one_block((b"x", entry(field(3, 1)))),
    "x: a shape that is unknown, empty": one_block((b"x", entry(shaped(3, 0), size=0))),
    "of more than 8 dimensions": one_block((b"x", entry(shaped(*[1] * 9), size=4))),
}
MALFORMED = {
    "no header": table(sealed(stored(b"x", entry()))),
    "no header ": table(),
    "x and y overlap": one_block((b"x", entry()), (b"y", entry(offset=15))),
    "16 bytes for shape [5]": one_block((b"x", entry(shaped(5)))),
    "x: 0 bytes for shape [9223372036854775808, 9223372036854775808]": one_block(
        (b"x", entry(shaped(2**63, 2**63), size=0))
    ),
    "x: in data file 1 of 1": one_block((b"x", entry(shard=1))),
    "x: in data file 0 of 0": one_block((b"x", entry()), shards=0),
    r"\xff: a name that is not UTF-8": one_block((b"\xff", entry())),
    "names are not in order": one_block((b"x", entry()), (b"x", entry(offset=16))),
    "no block begins at": table(sealed(stored(b"", header())), sealed(stored(b"x", entry())), order=[0, 1, 1]),
    "no block begins at 0 ": table(sealed(stored(b"", header())), sealed(stored(b"x", entry())), order=[1, 0]),
    "no block begins at 26": table(sealed(stored(b"", header())), gap=b"x"),
    "a name shares more than there is": table(sealed(stored(b"", header()) + stored(b"x", entry(), shared=1))),
    "or is too long": one_block((b"x" * 1001, entry())),
    "more than 1,048,576 bytes": bytes(2**20) + one_block(),
    "shorter than the list": table(sealed(stored(b"", header()), restarts=struct.pack("<I", 99))),
    "cut off": table(sealed(varint(0) + varint(0) + varint(99) + header())),
    "more than 64 bits": one_block((b"x", entry(more=field(9, 0)[:1] + b"\xff" * 9 + b"\x7f"))),
    "not a protocol buffer": one_block((b"x", b"\x0c")),
}


@pytest.mark.parametrize(("reason", "index"), (UNSUPPORTED | MALFORMED).items(), ids=(UNSUPPORTED | MALFORMED).keys())
def test_an_index_that_tensorflow_would_not_write_is_refused_with_the_reason(tmp_path, reason, index):
    what = refused(written(tmp_path, index)).what
    assert what.startswith(f"{INDEX} damaged (") and reason.strip() in what


def test_data_that_ends_early_is_refused_before_it_is_read(tmp_path):
    index = one_block((b"x", entry(shaped(2**58), size=2**60)))
    assert refused(written(tmp_path, index)).what == f"{DATA} damaged (64 bytes, x ends at {2**60:,})"


def changed(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four bytes replaced, inserted or removed."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, byte = rng.integers(len(found)), rng.integers(256)
        how = rng.integers(4)
        if how < 2:
            found[at] = byte
        elif how == 2:
            found.insert(at, byte)
        else:
            del found[at]
    return bytes(found)


def test_garbage_and_changes_with_the_right_checksums_end_in_one_line_or_in_verified_values(tmp_path, record_property):
    rng, prefix = np.random.default_rng(0), copied("tiny", tmp_path)
    path = Path(f"{prefix}.index")
    good = path.read_bytes()
    values = {digest(tensor) for tensor in tf_bundle.read(prefix).values()}
    end = good.index(sealed(b""))  # the next block: what comes before it holds the variables
    entries, magic, read = good[: end - 5], struct.pack("<Q", MAGIC), 0
    assert table(good[:end])[: -tf_bundle.FOOTER].startswith(good[:end] + sealed(b""))
    n_random, n_changed = 300, 700
    for i in range(n_random):
        path.write_bytes(rng.bytes(rng.integers(300)) + (magic if i % 2 else b""))
        refused(prefix)
    for i in range(n_changed):
        path.write_bytes(table(sealed(changed(entries, rng), restarts=b"")))
        try:
            tensors = tf_bundle.read(prefix)
        except UserError as error:
            assert error.code == 3, i
        else:
            assert {digest(tensor) for tensor in tensors.values()} <= values, i
            read += 1
    assert 0 < read < n_changed / 2
    record_property(
        "count",
        f"{n_random} random and {n_changed} changed indexes with the right checksums: {read} of them only renamed "
        "variables or the like, the others were refused",
    )


def test_names_that_grow_with_each_variable_do_not_fill_the_memory(tmp_path):
    """Each name is that of the variable before and two bytes more: together they would be far larger than the file."""
    entries = stored(b"", header()) + b"".join(stored(b"xx", entry(), shared=2 * i) for i in range(1_000))
    assert "is too long" in refused(written(tmp_path, table(sealed(entries)))).what


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is resident")
def test_variables_are_mapped_not_copied_and_the_file_is_never_written_to(tmp_path, record_property):
    size = 2**26
    index = one_block((b"x", entry(shaped(size // 4), size=size)), (b"y", entry(offset=size)))
    prefix = written(tmp_path, index)
    os.truncate(tmp_path / DATA, size + 16)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the largest resident size is counted anew
    before = resident("VmRSS")
    tensor = tf_bundle.read(prefix)["x"]
    grown = resident("VmHWM") - before
    assert grown < tf_bundle.PIECE + 2**22 and resident_kb(tmp_path / DATA) < 1024
    assert float(tensor.sum()) == 0 and resident_kb(tmp_path / DATA) > size // 2**10 - 1024
    tensor_files.forget(tensor)
    assert resident_kb(tmp_path / DATA) < 1024
    tensor[:10] = 1
    assert (tmp_path / DATA).read_bytes()[:40] == bytes(40)
    record_property("count", f"{size:,} bytes of a TensorFlow checkpoint read with {grown:,} bytes of memory")
