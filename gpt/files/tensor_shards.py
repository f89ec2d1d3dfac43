"""Handles tensors whose rows are shared out to ranks, in memory and in files.

In memory such a tensor is a DTensor of torch's, in files it is its `Parts`: the rows of one rank after those of the
other. The number of rows need not be divisible: each rank has as many as the first, as long as there are some left.
torch.distributed is not imported here, as one process does without.
"""

from typing import Any

import torch
from torch import Tensor

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


def shape_of(tensor: Tensor | Parts) -> list[int]:
    """The shape of the whole."""
    first, *others = parts_of(tensor)
    return [len(first) + sum(map(len, others)), *first.shape[1:]] if first.dim() else []


def joined(tensor: Tensor | Parts) -> Tensor:
    """A copy in one part."""
    parts = parts_of(tensor)
    return torch.cat(parts) if len(parts) > 1 else parts[0].clone()


def on_cpu(tensors: dict[str, Tensor], is_first: bool = True) -> dict[str, Tensor]:
    """What this process writes of some tensors, on the CPU: its own rows, and where it `is_first` what every process
    has."""
    return {
        name: own_rows(tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if is_first or is_sharded(tensor)
    }
