"""A model in one file to share, `last_model.pt`, and models read back from such files, checkpoints and runs."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from gpt import durable
from gpt.checkpoint import FORMAT, WEIGHTS, Identity, best, listed, verify
from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError
from gpt.model import GPT
from gpt.tensorfiles import load_weights, read_safetensors, read_torch, unusable, weights_of


@dataclass(frozen=True)
class Loaded:
    """A model read back from disk, in float32 and evaluation mode."""

    model: GPT
    tokenizer_name: str
    template: str | None
    step: int
    path: Path


def save_model(path: Path, model: GPT, identity: Identity, step: int) -> None:
    """Writes weights and what is needed to use them into one file. Raises UserError (5)."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **identity.as_dict(), "weights": weights_of(model)}, file)
        durable.sync(temporary)
        os.replace(temporary, path)
        durable.sync(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        disk = error.__context__ if isinstance(error.__context__, OSError) else error  # torch wraps what the disk says
        reason = str(disk).splitlines()[0]
        raise UserError(f"{path.name} not written: {reason}", str(path.parent), code=ENVIRONMENT) from error


def load_model(path: Path, device: torch.device) -> Loaded:
    """A model from a run directory (its best checkpoint by validation loss, else the newest), a checkpoint directory,
    or a file that `save_model` wrote. Raises UserError (3) when there is nothing usable at `path`."""
    if path.is_file():
        identity, step, weights = read_file(path)
    elif path.is_dir():
        steps = listed(path / "checkpoints")
        path = best(steps) or (steps[-1] if steps else path)
        manifest = verify(path)
        identity, step, weights = manifest.identity, manifest.step, read_safetensors(path / WEIGHTS)
    else:
        raise UserError("no such file or directory", str(path), "give a run directory or a .pt file", CHECKPOINT)
    model = build(identity, weights, path)
    return Loaded(model.to(device).eval(), identity.tokenizer, identity.template, step, path)


def read_file(path: Path) -> tuple[Identity, int, dict[str, torch.Tensor]]:
    """Identity, step and weights from a file that `save_model` wrote. Raises UserError (3)."""
    content: Any = read_torch(path)
    if not isinstance(content, dict) or not {"format", "model", "weights"} <= content.keys():
        raise unusable(path, "not a model that this project wrote")
    if content["format"] not in range(1, FORMAT + 1):  # the same in all formats so far
        raise unusable(path, f"format {content['format']}, this version reads 1 to {FORMAT}")
    try:
        identity = TypeAdapter(Identity).validate_python({key: content.get(key) for key in Identity.__annotations__})
        step = TypeAdapter(int).validate_python(content.get("step"))
        weights = TypeAdapter(dict[str, object]).validate_python(content["weights"])
    except ValidationError as error:
        first = error.errors()[0]
        raise unusable(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    # One that is not contiguous can claim any size: a single number, repeated by a stride of 0.
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_contiguous() for tensor in weights.values()):
        raise unusable(path, "not all weights are contiguous tensors")
    return identity, step, weights


def build(identity: Identity, weights: dict[str, torch.Tensor], path: Path) -> GPT:
    """A model with these weights; one that is far larger than they are is not even built. Raises UserError (3)."""
    claimed = identity.model.n_parameters(identity.vocab_size)
    found = sum(tensor.numel() for tensor in weights.values())
    if claimed > 4 * found + 10**6 or identity.model.n_layer > len(weights):
        raise unusable(path, f"{found:,} numbers in {len(weights)} tensors, {claimed:,} in the model that it describes")
    try:
        model = GPT(identity.model, identity.vocab_size)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise unusable(path, f"not a model that this project wrote: {str(error).splitlines()[0]}") from error
    load_weights(model, weights, path)
    return model
