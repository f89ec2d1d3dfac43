"""Checkpoints: publish, verify, find, restore.

A checkpoint is a directory `step_00000120` that appears whole or not at all: it is written under a temporary name,
every file is flushed to the disk, a manifest with sizes and sha256 is written last, then the directory is renamed.
Which checkpoints exist is what the directory listing says, and which is the best one is what their manifests say; no
other file points at them. Nothing in a checkpoint can execute code: weights are safetensors, the rest is JSON and
tensors that `torch.load` reads with `weights_only=True`.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import nn

from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError
from gpt.loop import Progress
from gpt.model import GPT
from gpt.optim import Optimizer
from gpt.prompts import TEMPLATES
from gpt.schema import ModelConfig

log = logging.getLogger(__name__)

FORMAT = 1
# Settings that a run cannot change on the way and still be one run; its length may be changed.
DECISIVE = (
    "optimizer.", "schedule.", "seed", "data_fingerprint", "data.mask", "data.batching", "data.overflow",
    "train.tokens_per_step", "train.grad_clip", "train.one_batch",
)  # fmt: skip
WEIGHTS, STATE, CONFIG, MANIFEST = "model.safetensors", "state.pt", "config.json", "manifest.json"


@dataclass(frozen=True)
class Identity:
    """What a file of weights needs so that text can be generated from it: nothing else has to be known."""

    model: ModelConfig
    vocab_size: int
    tokenizer: str
    template: str | None  # None: a model of plain text

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Loaded:
    """A model read back from disk, in float32 and evaluation mode."""

    model: GPT
    tokenizer_name: str
    template: str | None
    step: int
    path: Path


def publish(
    run_dir: Path, model: GPT, optimizer: Optimizer, progress: Progress, identity: Identity, config: dict, keep: int
) -> Path:
    """Writes <run_dir>/checkpoints/step_<n> and removes all but the newest `keep` and the best one.

    Raises UserError (5), leaving nothing behind and older checkpoints alone, when the disk refuses.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        safetensors.torch.save_file(weights_of(model), temporary / WEIGHTS)
        with open(temporary / STATE, "wb") as file:
            torch.save({"optimizer": optimizer.state_dict(), "progress": asdict(progress)}, file)
        write_json(temporary / CONFIG, config)
        manifest = {
            "format": FORMAT,
            "step": progress.step,
            "val_loss": progress.best if progress.best_step == progress.step else None,
            **identity.as_dict(),
            "files": {name: describe_file(temporary / name) for name in (WEIGHTS, STATE, CONFIG)},
        }
        write_json(temporary / MANIFEST, {"content": manifest, "sha256": hash_json(manifest)})
        for name in (WEIGHTS, STATE, CONFIG, MANIFEST):
            sync(temporary / name)
        sync(temporary)
        if final.exists():  # of a run that went past this step, was damaged later, and repeats it now
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free / 1e9
        raise UserError(
            f"checkpoint {progress.step} not written: {str(error).splitlines()[0]}",
            f"{folder}, {free:.1f} GB free", "earlier checkpoints are intact", ENVIRONMENT,
        ) from error  # fmt: skip
    prune(folder, keep, progress.step)
    return final


def prune(folder: Path, keep: int, step: int) -> None:
    """Removes old checkpoints: all but the newest `keep` up to `step` and the best one.

    What is newer than `step` is left alone: checkpoints found damaged, which the run has gone back behind.
    """
    steps = [path for path in listed(folder) if path.name <= f"step_{step:08d}"]
    kept = {*steps[-keep:], best(steps)}
    for path in steps:
        if path not in kept:
            # Renamed first: a kill in the middle leaves a hidden folder, not half a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def listed(folder: Path) -> list[Path]:
    """The published checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def best(steps: list[Path]) -> Path | None:
    """Of some checkpoints the one with the lowest validation loss, going by their manifests."""
    losses = []
    for path in steps:
        try:
            loss = read_manifest(path)["val_loss"]
        except UserError:
            continue
        if loss is not None:
            losses.append((loss, path))
    return min(losses)[1] if losses else None


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written. Raises UserError (3) with the reason."""
    manifest = read_manifest(path)
    for name in (WEIGHTS, STATE, CONFIG):
        wanted = manifest["files"][name]
        file = path / name
        if not file.is_file():
            raise unusable(path, f"{name}: missing")
        if file.stat().st_size != wanted["bytes"]:
            raise unusable(path, f"{name}: {file.stat().st_size} bytes, not {wanted['bytes']}")
        if describe_file(file) != wanted:
            raise unusable(path, f"{name}: sha256 differs")
    return manifest


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint that passes `verify`, or None when the run has none at all; damaged ones are reported.

    Raises UserError (3) when there are checkpoints and none of them can be used: never a silent start from step 0.
    """
    steps = listed(run_dir / "checkpoints")
    damage = []
    for path in reversed(steps):
        try:
            verify(path)
        except UserError as error:
            damage.append(error.what)
            log.warning("%s", error.what)
            continue
        log.info("resuming from %s (%s)", path.name, f"newest valid of {len(steps)}")
        return path
    if damage:
        raise UserError(
            "no usable checkpoint: " + ", ".join(damage), str(run_dir / "checkpoints"),
            "the files are untouched; start again with another out_dir", CHECKPOINT,
        )  # fmt: skip
    return None


def resume(
    run_dir: Path, mode: str, model: GPT, optimizer: Optimizer, identity: Identity, config: dict[str, Any]
) -> Progress:
    """Goes on from the newest valid checkpoint of a run directory: fills model and optimizer, returns how far it was.

    Without any checkpoint, that is step 0. mode "never" refuses a directory that has some, with UserError; so does
    any mode when `config` differs from the checkpoint's in a value that the course of training depends on.
    """
    if mode == "never" and listed(run_dir / "checkpoints"):
        raise UserError(
            "the run directory holds checkpoints already", str(run_dir), "use resume=auto, or another out_dir"
        )
    path = newest_valid(run_dir)
    if path is None:
        return Progress()
    check_identity(path, identity)
    check_settings(path, config)
    return restore(path, model, optimizer)


def check_settings(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError naming every setting that decides batches or updates and is not what it was."""
    before = flatten(json.loads((path / CONFIG).read_bytes()))
    now = flatten(json.loads(json.dumps(config)))  # as they look after a file: lists for tuples
    keys = sorted(key for key in before.keys() | now.keys() if key.startswith(DECISIVE))
    changed = [f"{key} {before.get(key)} != {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
    if changed:
        raise UserError(
            "the run was started with other settings: " + ", ".join(changed), str(path), "choose another out_dir"
        )


def restore(path: Path, model: GPT, optimizer: Optimizer) -> Progress:
    """Fills model and optimizer, which must be of the same shape, from a verified checkpoint."""
    load_weights(model, safetensors.torch.load_file(path / WEIGHTS), path)
    state = load_tensors(path / STATE)
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def check_identity(path: Path, identity: Identity) -> None:
    """Raises UserError (3) naming all fields in which a checkpoint is of another model."""
    manifest = read_manifest(path)
    mine, theirs = flatten(identity.as_dict()), flatten({key: manifest[key] for key in identity.as_dict()})
    differing = [f"{key} {theirs.get(key)} != {mine[key]}" for key in mine if theirs.get(key) != mine[key]]
    if differing:
        raise UserError(
            "the checkpoint is of another model: " + ", ".join(differing), str(path),
            "use the run's own settings, or another out_dir", CHECKPOINT,
        )  # fmt: skip


def save_model(path: Path, model: GPT, identity: Identity, step: int) -> None:
    """Writes weights and what is needed to use them into one file, `last_model.pt`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **identity.as_dict(), "weights": weights_of(model)}, file)
        sync(temporary)
        temporary.rename(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path.name} not written: {error}", str(path.parent), code=ENVIRONMENT) from error


def load_model(path: Path, device: torch.device) -> Loaded:
    """A model from a run directory (its best checkpoint by validation loss, else the newest), a checkpoint directory,
    or a `.pt` file that `save_model` wrote. Raises UserError (3) when there is nothing usable at `path`."""
    if path.is_file():
        content = load_tensors(path)
        if not isinstance(content, dict) or not {"format", "model", "weights"} <= content.keys():
            raise unusable(path, "not a model that this project wrote")
        about, weights = content, content["weights"]
    elif path.is_dir():
        steps = listed(path / "checkpoints")
        path = best(steps) or (steps[-1] if steps else path)
        about = verify(path)
        weights = safetensors.torch.load_file(path / WEIGHTS)
    else:
        raise UserError("no such file or directory", str(path), "give a run directory or a .pt file", CHECKPOINT)
    check_format(path, about)
    try:
        config = TypeAdapter(ModelConfig).validate_python(about["model"])
        if about["template"] not in (None, *TEMPLATES):
            raise ValueError(f"template {about['template']}")
        model = GPT(config, about["vocab_size"])
        load_weights(model, weights, path)
        return Loaded(model.to(device).eval(), about["tokenizer"], about["template"], about["step"], path)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise unusable(path, f"not a model that this project wrote: {str(error).splitlines()[0]}") from error


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights by name, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load_weights(model: GPT, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copies weights into a model. Raises UserError (3) naming the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found, wanted = (list(d[name].shape) if name in d else "missing" for d in (weights, own))
        if found != wanted:
            raise unusable(path, f"tensor {name}: {found} in the file, {wanted} in the model")
    model.load_state_dict(weights)


def load_tensors(path: Path) -> Any:
    """Reads what torch.save wrote, tensors and plain values only. Raises UserError (3) for anything else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about the protocol of a pickle, which is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler stumbles over what is no pickle in many ways
        raise unusable(path, "not a file of tensors and plain values") from error


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        content, sha256 = manifest["content"], manifest["sha256"]
    except FileNotFoundError:
        raise unusable(path, f"{MANIFEST}: missing") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise unusable(path, f"{MANIFEST}: {error}") from error
    if hash_json(content) != sha256:
        raise unusable(path, f"{MANIFEST}: sha256 differs")
    check_format(path, content)
    return content


def check_format(path: Path, about: Any) -> None:
    written = about.get("format") if isinstance(about, dict) else None
    if written != FORMAT:
        raise unusable(path, f"format {written}, this version reads {FORMAT}")


def unusable(path: Path, reason: str) -> UserError:
    return UserError(f"{path.name} damaged or not a checkpoint ({reason})", str(path.parent), code=CHECKPOINT)


def describe_file(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 6}} -> {"model.n_layer": 6}"""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
