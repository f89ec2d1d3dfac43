"""Counts the bytes of the tensors that a process holds."""

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def held() -> int:
    """Bytes of all tensors that Python knows."""
    return sum(storage.nbytes() for storage in storages().values())


def storages() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors that Python knows, each once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors if not tensor.is_meta}


class Peak(TorchDispatchMode):
    """Inside the `with` block, `bytes` is the most that is held at a time after an operation. What is held by nothing
    but backward is counted, and what an operation takes for itself is not.

    Gradients of `shape` are added up in place, as backward does it unless a mode like this one looks on."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.bytes, self._shape = 0, shape
        self._storages = {key: weakref.ref(storage) for key, storage in storages().items()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.add.Tensor and all(tuple(tensor.shape) == self._shape for tensor in args):
            function = torch.ops.aten.add_.Tensor
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, result)):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        alive = {key: storage() for key, storage in self._storages.items() if storage() is not None}
        self._storages = {key: weakref.ref(storage) for key, storage in alive.items()}
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in alive.values()))
        return result
