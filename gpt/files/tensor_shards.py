"""Handles tensors whose rows are shared out to ranks, in memory and in files.

In memory such a tensor is a DTensor of torch's, in files it is its `Parts`: the rows of one rank after those of the
other. The number of rows need not be divisible: each rank has as many as the first, as long as there are some left.
torch.distributed is not imported here, as one process does without.
"""

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Parts = tuple[Tensor, ...]  # one below the other they are a tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only some rows of a tensor."""
    return hasattr(tensor, "device_mesh")


def own_rows(tensor: Any) -> Tensor:
    """The rows of a tensor that this process has, not copied: all of them, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def first_row(tensor: Any) -> int:
    """The number of the first of `own_rows`."""
    return first_rows(tensor)[tensor.device_mesh.get_local_rank()] if is_sharded(tensor) else 0


def first_rows(tensor: Any) -> list[int]:
    """Where the rows of each rank begin in a sharded tensor, and their number."""
    n_ranks = tensor.device_mesh.size()
    each = -(-len(tensor) // n_ranks)
    return [min(len(tensor), rank * each) for rank in range(n_ranks + 1)]


def sharded_like(rows: Tensor, tensor: Any) -> Tensor:
    """A tensor of which this process has `rows`, in the shape and on the ranks of another."""
    return type(tensor.data).from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def parts_of(tensor: Tensor | Parts) -> Parts:
    """Of a tensor in one part: that."""
    return tensor if isinstance(tensor, tuple) else (tensor,)


def shape_of(tensor: Tensor | Parts) -> list:
    """Of the parts together, one below the other; of each where they do not fit so."""
    shapes = [list(part.shape) for part in parts_of(tensor)]
    if len(shapes) == 1:
        return shapes[0]
    fits = all(shapes) and all(one[1:] == shapes[0][1:] for one in shapes)
    return [sum(one[0] for one in shapes), *shapes[0][1:]] if fits else shapes


def cut(parts: Parts, n_rows: int) -> Parts:
    """The first rows of a tensor, at most so many."""
    kept = []
    for part in parts:
        kept.append(part[:n_rows] if part.dim() else part)
        n_rows -= len(kept[-1]) if part.dim() else 0
    return tuple(kept)


def joined(tensor: Tensor | Parts) -> Tensor:
    """The tensor in one part, of parts that fit; several are copied."""
    parts = parts_of(tensor)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def on_cpu(tensors: Tensors, is_first: bool = True) -> Tensors:
    """What this process writes of some tensors, on the CPU: its own rows, and where it `is_first` what every process
    has."""
    return {
        name: own_rows(tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if is_first or is_sharded(tensor)
    }
