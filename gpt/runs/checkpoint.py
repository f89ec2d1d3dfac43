"""Publishes, verifies, finds and restores checkpoints.

A checkpoint is a directory `step_00000120` that appears whole or not at all: it is written under a temporary name,
every file is flushed to the disk, a manifest with sizes and sha256 is written last, then the directory is renamed.
It is valid when its manifest parses and every file is as it says. Which is the best one is what the manifests say; no
other file points at them. Nothing in a checkpoint can execute code: tensors are safetensors, the rest is JSON.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from gpt import optim
from gpt.config.data import TemplateName, TokenizerName
from gpt.config.families import AnyModelConfig
from gpt.config.fields import first_error
from gpt.config.schema import LoRAConfig
from gpt.errors import ENVIRONMENT, NUMERICAL, UserError, unusable
from gpt.files.atomic import sha256, sync, why_refused
from gpt.files.directory import in_bytes
from gpt.files.json_file import read_object
from gpt.files.tensor_files import load_weights, read_safetensors, read_torch, weights_of
from gpt.model import LanguageModel
from gpt.optim import Optimizer
from gpt.progress import Progress

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

FORMAT = 5
WEIGHTS, STATE, CONFIG, MANIFEST = "model.safetensors", "state.safetensors", "config.json", "manifest.json"
STATE_1 = "state.pt"  # optimizer and progress in format 1
NAME = re.compile(r"step_\d{8,}")
LARGEST_MANIFEST = 2**20  # bytes; they have about 2,000


@dataclass(frozen=True)
class Identity:
    """What a file of weights needs so that text can be generated from it: nothing else has to be known."""

    model: AnyModelConfig
    vocab_size: int
    tokenizer: TokenizerName
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
    tokenizer: TokenizerName
    template: TemplateName | None
    lora: LoRAConfig | None
    progress: Progress | None  # None: in STATE_1
    files: dict[str, FileFacts]

    @property
    def identity(self) -> Identity:
        return Identity(self.model, self.vocab_size, self.tokenizer, self.template, self.lora)


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


def publish(
    run_dir: Path, model: LanguageModel, optimizer: Optimizer, progress: Progress, identity: Identity,
    config: dict[str, Any], keep: int | None = None, best: float | None = None,
) -> Path:  # fmt: skip
    """Writes <run_dir>/checkpoints/step_<n>; removes all but the newest `keep` and the best one, with None nothing.
    `best` is its validation loss, if it is the best and `progress` does not say so yet. Raises UserError with nothing
    left behind and older checkpoints as they were: (5) when the disk refuses, (4) when a weight is not finite.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{progress.step:08d}"
    temporary = hidden(final, "new")
    weights, state = weights_of(model), optim.state_tensors(optimizer)
    for name, tensor in weights.items():
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise UserError(f"checkpoint {progress.step} not written: weight {name} is not finite", code=NUMERICAL)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = write_files(temporary, state, weights, config)
        content = {
            "format": FORMAT,
            "step": progress.step,
            "val_loss": progress.best if progress.best_step == progress.step else best,
            **identity.as_dict(),
            "progress": asdict(progress),
            "files": {name: asdict(facts) for name, facts in files.items()},
        }
        write_json(temporary / MANIFEST, {"content": content, "sha256": hash_json(content)})
        sync(temporary / MANIFEST)
        sync(temporary)
        if final.exists():
            final.rename(hidden(final, "replaced"))
        temporary.rename(final)
        sync(folder)
        shutil.rmtree(hidden(final, "replaced"), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(folder)
        raise not_written(run_dir, progress.step, [*weights.values(), *state.values()], error) from error
    if keep:
        prune(folder, keep, progress.step)
    return final


def write_files(directory: Path, state: Tensors, weights: Tensors, config: dict[str, Any]) -> dict[str, FileFacts]:
    """Writes all files but the manifest and waits until they are on the disk. Hashing takes longer than writing, so it
    goes on in threads meanwhile. Raises OSError or SafetensorError."""
    hashed, synced = {}, []
    with ThreadPoolExecutor() as threads:
        for name, content in ((CONFIG, config), (STATE, state), (WEIGHTS, weights)):
            path = directory / name
            if name == CONFIG:
                write_json(path, content)
            else:
                safetensors.torch.save_file(content, path)
                shutil.copymode(directory / CONFIG, path)  # safetensors lets nobody else read, whatever the umask
            hashed[name] = threads.submit(facts_of, path)
            synced.append(threads.submit(sync, path))
        for future in synced:
            future.result()
        return {name: future.result() for name, future in hashed.items()}


def not_written(run_dir: Path, step: int, tensors: list[torch.Tensor], error: Exception) -> UserError:
    """The error for a checkpoint that the disk has refused."""
    needed = in_bytes(sum(tensor.nbytes for tensor in tensors))
    free = in_bytes(shutil.disk_usage(run_dir).free)
    return UserError(
        f"checkpoint {step} not written: {why_refused(error)} (needs {needed}, {free} free)",
        str(run_dir), "earlier checkpoints are intact; make room and go on", ENVIRONMENT,
    )  # fmt: skip


def prune(folder: Path, keep: int, step: int) -> None:
    """Removes old checkpoints: all but the newest `keep` up to `step` and the best one.

    What is newer than `step` is left alone: checkpoints found damaged, which the run has gone back behind.
    """
    steps = [path for path in listed(folder) if number_of(path) <= step]
    kept = {*steps[-keep:], best(steps)}
    for path in (path for path in steps if path not in kept):
        remove(path)


def remove(path: Path) -> None:
    """Removes a checkpoint: renamed first, so that a kill in the middle leaves no half one."""
    doomed = hidden(path, "removed")
    try:
        path.rename(doomed)
    except OSError as error:
        log.warning(f"{path} cannot be removed ({error.strerror})")
    shutil.rmtree(doomed, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clears away what a killed process has left behind; a checkpoint that was about to be replaced comes back."""
    for path in folder.glob(".step_*"):
        name, _, state = path.name[1:].partition(".")
        if state == "replaced" and not (folder / name).exists():
            with contextlib.suppress(OSError):
                path.rename(folder / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def hidden(path: Path, state: str) -> Path:
    """The name of a directory that is no checkpoint yet, or no longer."""
    return path.with_name(f".{path.name}.{state}")


def listed(folder: Path) -> list[Path]:
    """The published checkpoints of a folder, oldest first."""
    return sorted((p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and p.is_dir()), key=number_of)


def unlisted(folder: Path) -> list[Path]:
    """What else is in the folder and not hidden: perhaps checkpoints that somebody has renamed."""
    return sorted({path for path in folder.glob("*") if not path.name.startswith(".")} - set(listed(folder)))


def number_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def best(steps: list[Path]) -> Path | None:
    """Of some checkpoints the one with the lowest validation loss, going by their manifests."""
    losses = []
    for path in steps:
        try:
            loss = read_manifest(path).val_loss
        except UserError:
            continue
        if loss is not None:
            losses.append((loss, path))
    return min(losses)[1] if losses else None


def is_valid(path: Path) -> bool:
    """Whether a checkpoint passes `verify`."""
    try:
        verify(path)
    except UserError:
        return False
    return True


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as they were written. Raises UserError (3) with the reason."""
    manifest = read_manifest(path)
    for name in (WEIGHTS, STATE if manifest.progress else STATE_1, CONFIG):
        file, wanted = path / name, manifest.files.get(name)
        if wanted is None or not file.is_file():
            raise unusable(path, f"{name}: missing")
        if file.stat().st_size != wanted.bytes:
            raise unusable(path, f"{name}: {file.stat().st_size} bytes, not {wanted.bytes}")
        try:
            facts = facts_of(file)
        except OSError as error:
            raise unusable(path, f"{name}: {error.strerror}") from error
        if facts != wanted:
            raise unusable(path, f"{name}: sha256 differs")
    if NAME.fullmatch(path.name) and number_of(path) != manifest.step:
        raise unusable(path, f"{MANIFEST}: of step {manifest.step}")
    return manifest


def restore(path: Path, model: LanguageModel, optimizer: Optimizer) -> Progress:
    """Fills model and optimizer, which must be of the same shape, from a verified checkpoint."""
    manifest = read_manifest(path)
    load_weights(model, read_safetensors(path / WEIGHTS), path)
    try:
        if manifest.progress is None:
            state, progress = read_state_1(path / STATE_1, optimizer)
        else:
            state, progress = read_safetensors(path / STATE), manifest.progress
        optim.load_state_tensors(optimizer, state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise unusable(path, f"state of another optimizer: {error}") from error
    return progress


def read_state_1(path: Path, optimizer: Optimizer) -> tuple[Tensors, Progress]:
    """Optimizer state and progress of format 1, which had reported every step that it saved."""
    content = read_torch(path)
    state_dicts, names = content["optimizer"], list(optim.parts(optimizer))
    if len(names) == 1:
        state_dicts = {names[0]: state_dicts}
    return optim.flatten_state(state_dicts), Progress(**content["progress"], reported=content["progress"]["step"])


def read_config(path: Path) -> dict[str, Any]:
    """The settings that a verified checkpoint was written with. Raises UserError (3)."""
    try:
        config = read_object(path / CONFIG)
        if "data_fingerprint" in config:  # its place in format 1
            config["data"] = config.get("data", {}) | {"fingerprint": config.pop("data_fingerprint")}
        return config
    except (OSError, ValueError, TypeError) as error:
        raise unusable(path, f"{CONFIG}: not the settings of a run") from error


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
    if not isinstance(written, int) or not 1 <= written <= FORMAT:
        raise ValueError(f"format {written}, this version reads 1 to {FORMAT}")
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


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
