"""Writes last_model.pt, a model in a file to share, and reads the weights of such files, checkpoints and runs."""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from gpt import lora, tokenizer
from gpt.config.fields import first_error
from gpt.config.schema import LoRAConfig
from gpt.errors import ENVIRONMENT, UserError, unusable
from gpt.files import atomic
from gpt.files.tensor_files import weights_of
from gpt.files.tensor_shards import Parts, Tensors, is_sharded, joined, shape_of
from gpt.model import LanguageModel
from gpt.runs.checkpoint import best, listed, read_parts, verify
from gpt.runs.manifest import FORMAT, UPGRADES, Identity, read_manifest

LAST_MODEL = "last_model.pt"  # of a run
TOKENIZER = "tokenizer_files"  # in it: name -> text, of a tokenizer that is not built in


@dataclass(frozen=True)
class Loaded:
    """A model read back from disk, in float32 and evaluation mode."""

    model: LanguageModel
    tokenizer_name: str
    template: str | None
    step: int
    path: Path
    files: tuple[Path, ...] = ()  # that its weights are in


def save_model(
    path: Path, model: LanguageModel, identity: Identity, step: int, checkpoint: Path | None = None
) -> None:  # fmt: skip
    """Writes weights, adapters folded into them, and what is needed to use them into one file. Raises UserError (5).
    Those of a model that is sharded are taken from its checkpoint."""
    alone = replace(identity, lora=None)
    try:
        with (
            whole(model, identity.lora, checkpoint) as weights,
            atomic.replacing(path) as temporary,
            open(temporary, "wb") as file,
        ):
            content = {"format": FORMAT, "step": step, **alone.as_dict(), "weights": weights}
            if files := tokenizer.load(identity.tokenizer).files:
                content[TOKENIZER] = {name: text.decode() for name, text in files.items()}
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        disk = error.__context__ if isinstance(error.__context__, OSError) else error  # torch wraps what the disk says
        reason = str(disk).splitlines()[0]
        raise UserError(f"{path.name} not written: {reason}", str(path.parent), code=ENVIRONMENT) from error


@contextlib.contextmanager
def whole(model: LanguageModel, cfg: LoRAConfig | None, checkpoint: Path | None) -> Iterator[Tensors]:
    """The weights, adapters folded into them, on the CPU. Those of a model that is sharded are put together from its
    checkpoint one after the other, in files that are mapped into memory: this process may have no room for all of them.
    Raises OSError."""
    if not any(map(is_sharded, model.state_dict().values())):
        weights = weights_of(model)
        yield lora.merged_weights(weights, cfg) if cfg else weights
        return
    parts = read_parts(checkpoint, read_manifest(checkpoint).weights)
    with tempfile.TemporaryDirectory(prefix=".weights", dir=checkpoint.parent.parent) as folder:
        weights = {}
        for number, name in enumerate(name for name in parts if not name.endswith(lora.SUFFIXES)):
            tensor, layer = parts[name], name.removesuffix(".weight")
            if f"{layer}.lora_a" in parts:
                names = (name, *(f"{layer}{suffix}" for suffix in lora.SUFFIXES))
                tensor = (lora.merged_weights({name: joined(parts[name]) for name in names}, cfg)[name],)
            weights[name] = mapped(tensor, Path(folder) / str(number))
        yield weights


def mapped(parts: Parts, file: Path) -> torch.Tensor:
    """A tensor that is written to a new file, and mapped from there. Raises OSError."""
    with open(file, "wb") as opened:
        for part in parts:
            opened.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
    shape, first = shape_of(parts), parts[0]
    return torch.from_file(str(file), False, math.prod(shape), dtype=first.dtype).view(shape)


def is_model(content: Any) -> bool:
    """Whether what torch.save wrote is what `save_model` writes."""
    return isinstance(content, dict) and {"format", "model", "weights"} <= content.keys()


def read_directory(path: Path) -> tuple[Identity, int, dict[str, Parts], list[Path], Path]:
    """Identity, step and weights of a run directory (its best checkpoint by validation loss, else the newest) or of one
    checkpoint, the files that these are in, and the path of that. Raises UserError (3)."""
    steps = listed(path / "checkpoints")
    path = best(steps) or (steps[-1] if steps else path)
    manifest = verify(path)
    weights = read_parts(path, manifest.weights)
    tokenizer.carried(manifest.tokenizer, path)
    return manifest.identity, manifest.step, weights, [path / name for name in manifest.weights], path


def read_content(content: dict[str, Any], path: Path) -> tuple[Identity, int, dict[str, Parts], list[Path], Path]:
    """The same of what `save_model` wrote into the file `path`. Raises UserError (3)."""
    if content["format"] not in range(1, FORMAT + 1):
        raise unusable(path, f"format {content['format']}, this version reads 1 to {FORMAT}")
    try:
        for number in range(max(3, content["format"]), FORMAT):  # the formats before 3 are the same
            content = UPGRADES[number](content)
        identity = TypeAdapter(Identity).validate_python({key: content.get(key) for key in Identity.__annotations__})
        step = TypeAdapter(int).validate_python(content.get("step"))
        weights = TypeAdapter(dict[str, object]).validate_python(content["weights"])
        files = TypeAdapter(dict[str, str]).validate_python(content.get(TOKENIZER, {}))
    except TypeError as error:
        raise unusable(path, "not a model that this project wrote") from error
    except ValidationError as error:
        raise unusable(path, first_error(error)) from error
    tokenizer.carried(identity.tokenizer, path, {name: text.encode() for name, text in files.items()})
    # One that is not contiguous can claim any size: a single number, repeated by a stride of 0.
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_contiguous() for tensor in weights.values()):
        raise unusable(path, "not all weights are contiguous tensors")
    return identity, step, {name: (tensor,) for name, tensor in weights.items()}, [path], path
