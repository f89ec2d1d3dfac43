"""Describes what is in a checkpoint: manifest.json, in the current format and in earlier ones."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from gpt import tokenizer
from gpt.config.data import TemplateName
from gpt.config.families import AnyModelConfig
from gpt.config.fields import first_error
from gpt.config.schema import LoRAConfig
from gpt.errors import unusable
from gpt.files.atomic import sha256
from gpt.files.json_file import read_object
from gpt.progress import Progress

FORMAT, SHARDED = 5, 6  # the second has the weights and the state in a file for each rank, and else is the same
WEIGHTS, STATE, CONFIG, MANIFEST = "model.safetensors", "state.safetensors", "config.json", "manifest.json"
STATE_1 = "state.pt"  # optimizer and progress in format 1
OF = re.compile(r"\.\d+-of-(\d{1,6})\.safetensors$")  # what the name of a rank's file ends with
TokenizerKey = Annotated[str, Field(pattern=tokenizer.NAMES)]
LARGEST_MANIFEST = 2**24  # bytes; they have about 2,000, and 330 more for each rank


@dataclass(frozen=True)
class Identity:
    """What a file of weights needs so that text can be generated from it: nothing else has to be known."""

    model: AnyModelConfig
    vocab_size: int
    tokenizer: TokenizerKey
    template: TemplateName | None  # None: a model of plain text
    lora: LoRAConfig | None = None  # adapters beside the weights

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says about a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `val_loss` is that of the run's best evaluation, if it was at this very step."""

    format: int
    step: int
    val_loss: float | None
    model: AnyModelConfig
    vocab_size: int
    tokenizer: TokenizerKey
    template: TemplateName | None
    lora: LoRAConfig | None
    progress: Progress | None  # None: in STATE_1
    files: dict[str, FileFacts]

    @property
    def weights(self) -> list[str]:
        """The files that the weights are in."""
        return self._files(WEIGHTS)

    @property
    def state(self) -> list[str]:
        """The files that the optimizer's state is in."""
        return self._files(STATE) if self.progress else [STATE_1]

    @property
    def texts(self) -> list[str]:
        """The files that are no tensors."""
        return [CONFIG] if self.tokenizer in tokenizer.TOKENIZERS else [CONFIG, *sorted(tokenizer.FILES)]

    def _files(self, name: str) -> list[str]:
        """A file, or one for each rank, in their order, which all say how many there are."""
        if self.format != SHARDED:
            return [name]
        counts = [int(match[1]) for match in map(OF.search, self.files) if match]
        return [of_rank(name, rank, max(counts, default=1)) for rank in range(max(counts, default=1))]

    @property
    def identity(self) -> Identity:
        return Identity(self.model, self.vocab_size, self.tokenizer, self.template, self.lora)


def of_rank(name: str, rank: int, count: int) -> str:
    """model.safetensors -> model.1-of-4.safetensors, of the first of four ranks."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{rank + 1}-of-{count}.{suffix}"


MANIFESTS = TypeAdapter(Manifest)  # takes 10 ms to make
FIELDS = dataclasses.fields(Progress)

UNSCALED = {"loss_scale": 2.0**16, "steady": 0}  # before format 3 there was no float16
# Format n -> what turns the content of its manifest into one of format n + 1; tests/golden has a checkpoint of each.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda content: content | {"format": 2, "progress": None},
    2: lambda content: content | {"format": 3, "progress": content["progress"] and content["progress"] | UNSCALED},
    3: lambda content: content | {"format": 4, "model": content["model"] | {"gelu": "tanh"}, "lora": None},
    4: lambda content: content | {"format": 5, "model": content["model"] | {"family": "gpt2"}},  # there was no other
}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, in the current format. Raises UserError (3)."""
    file = path / MANIFEST
    if not file.is_file():  # also a pipe, which would be waited for
        raise unusable(path, f"{MANIFEST}: missing")
    try:
        manifest = read_object(file, LARGEST_MANIFEST)
        content, sha256 = manifest["content"], manifest["sha256"]
        if hash_json(content) != sha256:
            raise ValueError("sha256 differs")
        return parse(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable(path, f"{MANIFEST}: {' '.join(str(error).split())[:200]}") from error


def parse(content: Any) -> Manifest:
    """A manifest from JSON, brought to the current format. Raises ValueError."""
    written = content.get("format") if isinstance(content, dict) else None
    if not isinstance(written, int) or not 1 <= written <= SHARDED:
        raise ValueError(f"format {written}, this version reads 1 to {SHARDED}")
    for number in range(written, FORMAT):
        content = UPGRADES[number](content)
    try:
        manifest = MANIFESTS.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ValueError(first_error(error)) from error
    if manifest.progress and (manifest.progress.step != manifest.step or len(content["progress"]) != len(FIELDS)):
        raise ValueError("progress is incomplete")
    return manifest


def facts_of(path: Path) -> FileFacts:
    """Size and hash of a file as it is."""
    return FileFacts(path.stat().st_size, sha256(path))


def in_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
