"""Reads tensors from files without ever executing what is in them, and gives them to a model only if they fit.

What is read is mapped into memory, not copied: a file takes room as its tensors are looked at, until `forget`.
"""

import ctypes
import mmap
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from gpt.errors import CHECKPOINT, UserError, unusable
from gpt.files.tensor_shards import Parts, first_row, on_cpu, own_rows, parts_of, shape_of


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """name -> tensor, on the CPU. Raises UserError (3)."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise unusable(path, f"not a safetensors file: {str(error).splitlines()[0]}") from error


def read_torch(path: Path) -> Any:
    """What torch.save wrote, tensors and plain values only, on the CPU. Raises UserError (3) for anything else, and
    for a file whose checksums (of a zip archive, which such a file is) differ."""
    if not zipfile.is_zipfile(path):
        raise unusable(path, "not a file of tensors and plain values, or of a torch before 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores without compressing: what is compressed may inflate to anything
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise unusable(path, "compressed")
            damaged = archive.testzip()
        if damaged:
            raise unusable(path, f"{damaged}: crc32 differs")
        with warnings.catch_warnings(action="ignore"):  # about the protocol of a pickle, which is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # the unpickler stumbles over what is no pickle in many ways
        code = needed_code(path)
        if not code:
            raise unusable(path, "not a file of tensors and plain values") from error
        raise UserError(
            f"{path.name} is no plain file of weights: unpickling it would call {code}", str(path.parent),
            "whoever has made it can convert it: torch.save(model.state_dict(), 'weights.pth')", CHECKPOINT,
        ) from error  # fmt: skip


def needed_code(path: Path) -> str:
    """What a pickle of torch.save would import and call; it is not. Empty where nothing is known."""
    try:
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path))[:3])[:200]
    except Exception:  # no pickle at all
        return ""


def forget(tensor: Tensor) -> None:
    """Frees the memory that a tensor mapped from a file takes; it is read again when it is looked at once more.

    A tensor that is not mapped from a file loses its content. Does nothing where the system cannot do it.
    """
    if sys.platform == "linux" and tensor.numel():
        page, start = mmap.PAGESIZE, tensor.data_ptr()
        first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page  # whole pages only
        if last > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def weights_of(model: nn.Module, is_first: bool = True) -> dict[str, Tensor]:
    """All weights by name, `on_cpu`."""
    return on_cpu(model.state_dict(), is_first)


PIECE = 2**24  # bytes copied at a time


def load_weights(model: nn.Module, weights: Mapping[str, Tensor | Parts], path: Path) -> None:
    """Copies weights mapped from `path` into a model. Raises UserError (3) naming the first that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        in_file, wanted = (describe(tensors.get(name)) for tensors in (weights, own))
        if in_file != wanted:
            raise unusable(path, f"tensor {name}: {in_file} in the file, {wanted} in the model")
    for name, tensor in weights.items():
        copy_rows(parts_of(tensor), own[name])


def copy_rows(parts: Parts, target: Tensor) -> None:
    """Copies a tensor mapped from files; of a sharded one, only the rows that this process has."""
    rows, wanted = own_rows(target), first_row(target)
    start = 0
    for part in parts:
        first, last = max(start, wanted), min(start + len(part), wanted + len(rows))
        if first < last:
            copy(part[first - start : last - start], rows[first - wanted : last - wanted])
        start += len(part)


@torch.no_grad()
def copy(source: Tensor, target: Tensor) -> None:
    """Copies a tensor mapped from a file, piece by piece, so that hardly any of it is in memory twice."""
    if source.dim() == 2 and not source.is_contiguous():
        source, target = source.T, target.T  # pieces shall be contiguous in the file
    step = max(1, PIECE * len(source) // max(1, source.nbytes))
    for start in range(0, len(source), step):
        piece = source[start : start + step]
        target[start : start + step].copy_(piece)
        if piece.is_contiguous():
            forget(piece)


def describe(tensor: Tensor | Parts | None) -> str:
    """Shape and type of a tensor, for comparison and for people."""
    if tensor is None:
        return "missing"
    return f"{shape_of(tensor)} {str(parts_of(tensor)[0].dtype).removeprefix('torch.')}"
