"""Writes last_model.pt, a model in a file to share, and reads the weights of such files, checkpoints and runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from gpt import lora
from gpt.config.fields import first_error
from gpt.errors import ENVIRONMENT, UserError, unusable
from gpt.files import atomic
from gpt.files.tensor_files import read_safetensors, weights_of
from gpt.model import LanguageModel
from gpt.runs.checkpoint import FORMAT, UPGRADES, WEIGHTS, Identity, Tensors, best, listed, verify

LAST_MODEL = "last_model.pt"  # of a run


@dataclass(frozen=True)
class Loaded:
    """A model read back from disk, in float32 and evaluation mode."""

    model: LanguageModel
    tokenizer_name: str
    template: str | None
    step: int
    path: Path
    files: tuple[Path, ...] = ()  # that its weights are in


def save_model(path: Path, model: LanguageModel, identity: Identity, step: int) -> None:
    """Writes weights, adapters folded into them, and what is needed to use them into one file. Raises UserError (5)."""
    weights = weights_of(model)
    if identity.lora:
        weights, identity = lora.merged_weights(weights, identity.lora), replace(identity, lora=None)
    try:
        with atomic.replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **identity.as_dict(), "weights": weights}, file)
    except (OSError, RuntimeError) as error:
        disk = error.__context__ if isinstance(error.__context__, OSError) else error  # torch wraps what the disk says
        reason = str(disk).splitlines()[0]
        raise UserError(f"{path.name} not written: {reason}", str(path.parent), code=ENVIRONMENT) from error


def is_model(content: Any) -> bool:
    """Whether what torch.save wrote is what `save_model` writes."""
    return isinstance(content, dict) and {"format", "model", "weights"} <= content.keys()


def read_directory(path: Path) -> tuple[Identity, int, Tensors, Path]:
    """Identity, step and weights of a run directory (its best checkpoint by validation loss, else the newest) or of one
    checkpoint, and the path of that. Raises UserError (3)."""
    steps = listed(path / "checkpoints")
    path = best(steps) or (steps[-1] if steps else path)
    manifest = verify(path)
    return manifest.identity, manifest.step, read_safetensors(path / WEIGHTS), path


def read_content(content: dict[str, Any], path: Path) -> tuple[Identity, int, Tensors, Path]:
    """The same of what `save_model` wrote into the file `path`. Raises UserError (3)."""
    if content["format"] not in range(1, FORMAT + 1):
        raise unusable(path, f"format {content['format']}, this version reads 1 to {FORMAT}")
    try:
        for number in range(max(3, content["format"]), FORMAT):  # the formats before 3 are the same
            content = UPGRADES[number](content)
        identity = TypeAdapter(Identity).validate_python({key: content.get(key) for key in Identity.__annotations__})
        step = TypeAdapter(int).validate_python(content.get("step"))
        weights = TypeAdapter(dict[str, object]).validate_python(content["weights"])
    except TypeError as error:
        raise unusable(path, "not a model that this project wrote") from error
    except ValidationError as error:
        raise unusable(path, first_error(error)) from error
    # One that is not contiguous can claim any size: a single number, repeated by a stride of 0.
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_contiguous() for tensor in weights.values()):
        raise unusable(path, "not all weights are contiguous tensors")
    return identity, step, weights, path
