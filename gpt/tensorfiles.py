"""Tensors in files: read without ever executing what is in them, and given to a model only if they fit."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gpt.errors import CHECKPOINT, UserError


def unusable(path: Path, reason: str) -> UserError:
    """The error for a checkpoint or a file of weights that cannot be used."""
    return UserError(f"{path.name} damaged ({reason})", str(path.parent), code=CHECKPOINT)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """name -> tensor, on the CPU. Raises UserError (3)."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise unusable(path, f"not a safetensors file: {str(error).splitlines()[0]}") from error


def read_torch(path: Path) -> Any:
    """What torch.save wrote, tensors and plain values only, on the CPU. Raises UserError (3) for anything else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about the protocol of a pickle, which is refused anyway
            if zipfile.is_zipfile(path):  # torch stores without compressing: what is compressed may inflate to anything
                with zipfile.ZipFile(path) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                        raise ValueError("compressed")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler stumbles over what is no pickle in many ways
        raise unusable(path, "not a file of tensors and plain values") from error


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copies weights that came from `path` into a model. Raises UserError (3) naming the first that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found, wanted = (describe(tensors.get(name)) for tensors in (weights, own))
        if found != wanted:
            raise unusable(path, f"tensor {name}: {found} in the file, {wanted} in the model")
    model.load_state_dict(weights)


def describe(tensor: Tensor | None) -> str:
    """Shape and type of a tensor, for comparison and for people."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" if tensor is not None else "missing"
