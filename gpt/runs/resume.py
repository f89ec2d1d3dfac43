"""Finds the checkpoint that a run goes on from, and refuses settings with which it would be another run."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import places
from gpt.config.schema import ADDED, TrainConfig, flatten
from gpt.config.value_errors import holder, unknown_key, valid_keys
from gpt.errors import CHECKPOINT, UserError
from gpt.files.directory import another
from gpt.model import LanguageModel
from gpt.optim import Optimizer
from gpt.progress import Progress
from gpt.runs import checkpoint
from gpt.runs.checkpoint import Identity, Manifest

log = logging.getLogger(__name__)

# Settings that a run cannot change on the way and still be one run. Its length may be changed, with a warning.
DECISIVE = (
    "init", "finetune", "objective", "optimizer", "schedule", "seed", "data", "train.tokens_per_step",
    "train.grad_clip", "train.ema", "train.one_batch", "train.eval_tokens", "train.patience", "train.max_skipped",
)  # fmt: skip
# Of the data, what is in the prepared files is told by their fingerprint, and these keys tell what is made of them.
DATA_KEYS = ("data.mask", "data.batching", "data.overflow", "data.fingerprint")
ABSENT = ADDED | {"finetune.name": None}  # what it means that a setting, or a section, is not there


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint that a run goes on from."""

    path: Path
    manifest: Manifest
    config: dict[str, Any]  # the settings that it was written with

    @property
    def environment(self) -> dict[str, Any]:
        """What gpt/machine/device.py recorded of where the run began; empty in format 1."""
        recorded = self.config.get("environment")
        return recorded if isinstance(recorded, dict) else {}

    @property
    def fingerprint(self) -> str | None:
        """Of the prepared data that the run has trained on."""
        data = self.config.get("data")
        return data.get("fingerprint") if isinstance(data, dict) else None


def find(run_dir: Path, mode: str) -> Checkpoint | None:
    """The newest valid checkpoint of a run directory, None if it has none at all; damaged ones are reported.

    Raises UserError (3) when there are checkpoints and none of them can be used: never a silent start from step 0. Mode
    "never" refuses a directory that has some.
    """
    folder = run_dir / "checkpoints"
    checkpoint.recover(folder)
    steps = checkpoint.listed(folder)
    if mode == "never" and steps:
        raise UserError(
            "the run directory holds checkpoints already", str(run_dir), f"use resume=auto, or {another(run_dir)}"
        )
    damage = [f"{path.name} is not the name of a checkpoint" for path in checkpoint.unlisted(folder)]
    for path in reversed(steps):
        try:
            manifest = checkpoint.verify(path)
            config = checkpoint.read_config(path)
        except UserError as error:
            damage.append(error.what)
            continue
        for what in damage:
            log.warning(f"{what}; using {path.name}")
        log.info(f"resuming from {path.name} (newest valid of {len(steps)})")
        return Checkpoint(path, manifest, config)
    if damage:
        raise UserError(
            "no usable checkpoint: " + ", ".join(damage), str(folder),
            f"the files are untouched; start again with {another(run_dir)}", CHECKPOINT,
        )  # fmt: skip
    return None


def reread(path: Path) -> Checkpoint:
    """A checkpoint that another process has just found and verified. Raises UserError (3)."""
    return Checkpoint(path, checkpoint.read_manifest(path), checkpoint.read_config(path))


def restore(
    previous: Checkpoint | None,
    model: LanguageModel,
    optimizer: Optimizer,
    identity: Identity,
    config: dict[str, Any],
    allowed: list[str],
) -> Progress:
    """Fills model and optimizer and returns how far the run was: step 0 for a new run.

    Raises UserError when model or settings are others than those of the checkpoint, except for `allowed` keys.
    """
    check_allowed(allowed)
    if previous is None:
        return Progress()
    check_identity(previous, identity)
    check_settings(previous, config, allowed)
    return checkpoint.restore(previous.path, model, optimizer)


def check_allowed(allowed: list[str]) -> None:
    """Raises UserError for a key of `allow_changed` that is no setting, or that a run cannot change: its model."""
    keys = [*valid_keys(TrainConfig), *DATA_KEYS]
    for key in allowed:
        if key not in keys and not holder(key, keys):
            raise UserError(f"allow_changed: {unknown_key(key, keys)}")
        if is_within(key, "model"):
            raise UserError(f"allow_changed: {key} cannot change: a checkpoint is of one model", remedy="leave it out")


def check_identity(previous: Checkpoint, identity: Identity) -> None:
    """Raises UserError (3) naming all fields in which a checkpoint is of another model."""
    now, before = flatten(identity.as_dict()), flatten(previous.manifest.identity.as_dict())
    keys = sorted(now.keys() | before.keys() - {"lora"})  # a section, or None
    differing = [f"{key} {before.get(key)} != {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
    if differing:
        raise UserError(
            "the checkpoint is of another model: " + ", ".join(differing), str(previous.path),
            f"use the run's own settings, or {another(previous.path.parents[1])}", CHECKPOINT,
        )  # fmt: skip


def check_settings(previous: Checkpoint, config: dict[str, Any], allowed: list[str]) -> None:
    """Raises UserError naming, with both values, every setting that decides batches or updates and has changed."""
    now_is_json = json.loads(json.dumps(config))  # as after a file: lists for tuples
    before, now = (ABSENT | flatten(places.with_paths(c, places.stored)) for c in (previous.config, now_is_json))
    changed = [key for key in now if before.get(key, now[key]) != now[key]]
    decisive = [key for key in changed if is_decisive(key)]
    if "optimizer.name" in changed:
        run_dir = previous.path.parents[1]
        raise UserError(
            f"optimizer.name {before['optimizer.name']} != {now['optimizer.name']}: a checkpoint is of one optimizer",
            str(previous.path), f"choose {another(run_dir)}, which init.from={run_dir} begins with its weights",
        )  # fmt: skip
    refused = [key for key in decisive if not any(is_within(key, allowed_key) for allowed_key in allowed)]
    if refused:
        if "data.fingerprint" in refused:  # then the other keys of the data say why
            refused += [key for key in changed if key.startswith("data.") and key not in refused]
        raise UserError(
            "the run was started with other settings: "
            + ", ".join(f"{key} {before[key]} != {now[key]}" for key in refused),
            str(previous.path), f"choose {another(previous.path.parents[1])}, or allow_changed=[{','.join(refused)}]",
        )  # fmt: skip
    for key in decisive:
        log.warning(f"{key} was {before[key]} and is now {now[key]}")
    was, now_is = (c.get("environment.micro_batch", c.get("train.micro_batch")) for c in (before, now))
    if was not in (None, now_is):  # the same sums in another order; what "auto" means is in the environment
        log.warning(f"train.micro_batch was {was}: results will differ in the last digits")
    if "total_steps" in changed:
        log.warning(
            f"the run was planned for {before['total_steps']} steps and is now for {now['total_steps']}: the learning "
            f"rate follows the new length"
        )


def is_decisive(key: str) -> bool:
    """Whether the course of training depends on a setting."""
    if key.startswith("data."):
        return key in DATA_KEYS
    return any(is_within(key, decisive) for decisive in DECISIVE)


def is_within(key: str, section: str) -> bool:
    """optimizer.lr is within optimizer, and within itself."""
    return key == section or key.startswith(section + ".")
