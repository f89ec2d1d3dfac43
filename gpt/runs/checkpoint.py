"""Publishes, verifies, finds and restores checkpoints.

A checkpoint is a directory `step_00000120` that appears whole or not at all: it is written under a temporary name,
every file is flushed to the disk, a manifest with sizes and sha256 is written last, then the directory is renamed.
It is valid when its manifest parses and every file is as it says. Which is the best one is what the manifests say; no
other file points at them. Nothing in a checkpoint can execute code: tensors are safetensors, the rest is JSON.

Where the tensors are sharded over ranks, each rank writes a file of its own rows: one tensor is the rows in the first
file, then those in the second. So nobody needs a whole one, and any number of ranks can read it.
"""

import contextlib
import logging
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from gpt import optim, tokenizer
from gpt.errors import ENVIRONMENT, NUMERICAL, UserError, unusable
from gpt.files.atomic import sync, why_refused
from gpt.files.directory import in_bytes
from gpt.files.json_file import read_object
from gpt.files.tensor_files import load_weights, read_safetensors, read_torch, weights_of
from gpt.files.tensor_shards import Parts, Tensors
from gpt.machine.ranks import ALONE, Ranks
from gpt.model import LanguageModel
from gpt.optim import Optimizer
from gpt.progress import Progress
from gpt.runs.manifest import (
    CONFIG,
    FORMAT,
    MANIFEST,
    SHARDED,
    STATE,
    STATE_1,
    WEIGHTS,
    Identity,
    Manifest,
    facts_of,
    hash_json,
    in_json,
    of_rank,
    read_manifest,
)  # fmt: skip

log = logging.getLogger(__name__)

NAME = re.compile(r"step_\d{8,}")


def publish(
    run_dir: Path, model: LanguageModel, optimizer: Optimizer, progress: Progress, identity: Identity,
    config: dict[str, Any], keep: int | None = None, best: float | None = None, ranks: Ranks = ALONE,
) -> Path:  # fmt: skip
    """Writes <run_dir>/checkpoints/step_<n>; removes all but the newest `keep` and the best one, with None nothing.
    `best` is its validation loss, if it is the best and `progress` does not say so yet. `ranks` are those that the
    model is sharded over; all of them call this. Raises UserError, in all of them, with nothing left behind and older
    checkpoints as they were: (5) when the disk refuses, (4) when a weight is not finite.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{progress.step:08d}"
    temporary = hidden(final, "new")
    weights, state = weights_of(model, ranks.is_first), optim.state_tensors(optimizer, ranks.is_first)
    for name in filter(None, ranks.gather(not_finite(weights))):
        raise UserError(f"checkpoint {progress.step} not written: weight {name} is not finite", code=NUMERICAL)

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def complete() -> None:
        content = {
            "format": FORMAT if ranks.count == 1 else SHARDED,
            "step": progress.step,
            "val_loss": progress.best if progress.best_step == progress.step else best,
            **identity.as_dict(),
            "progress": asdict(progress),
            "files": files,
        }
        (temporary / MANIFEST).write_bytes(in_json({"content": content, "sha256": hash_json(content)}))
        sync(temporary / MANIFEST)
        sync(temporary)
        if final.exists():
            final.rename(hidden(final, "replaced"))
        temporary.rename(final)
        sync(folder)
        shutil.rmtree(hidden(final, "replaced"), ignore_errors=True)

    try:
        by_all(ranks, begin if ranks.is_first else None)
        texts = {CONFIG: in_json(config), **tokenizer.load(identity.tokenizer).files}
        written = by_all(ranks, lambda: write_files(temporary, state, weights, texts, ranks))
        files = {name: facts for part in written for name, facts in part.items()}
        by_all(ranks, complete if ranks.is_first else None)
    except (OSError, SafetensorError) as error:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            recover(folder)
        needed = ranks.count * sum(tensor.nbytes for tensor in [*weights.values(), *state.values()])
        raise not_written(run_dir, progress.step, needed, error) from error
    if keep and ranks.is_first:
        prune(folder, keep, progress.step)
    return final


def not_finite(weights: Tensors) -> str | None:
    """The name of a weight that has a number which is not finite."""
    for name, tensor in weights.items():
        if tensor.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            return name
    return None


def by_all(ranks: Ranks, work: Callable[[], Any] | None) -> list[Any]:
    """What `work()` returns in each rank, once all have done theirs. Raises OSError in all of them if the disk has
    refused one."""
    result, refused = None, None
    try:
        result = work() if work else None
    except (OSError, SafetensorError) as error:
        if ranks.count == 1:
            raise
        refused = [getattr(error, "errno", None) or 0, why_refused(error)]
    answers = ranks.gather([result, refused])
    for _, refusal in answers:
        if refusal:
            raise OSError(*refusal)
    return [answer for answer, _ in answers]


def write_files(
    directory: Path, state: Tensors, weights: Tensors, texts: dict[str, bytes], ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Writes all files of this rank but the manifest and waits until they are on the disk. Returns their facts. Hashing
    takes longer than writing, so it goes on in threads meanwhile. Raises OSError or SafetensorError."""
    hashed, synced = {}, []
    with ThreadPoolExecutor() as threads:
        for name, content in [*(texts.items() if ranks.is_first else ()), (STATE, state), (WEIGHTS, weights)]:
            if name not in texts and ranks.count > 1:
                name = of_rank(name, ranks.rank, ranks.count)
            path = directory / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                safetensors.torch.save_file(content, path)
                path.chmod(directory.stat().st_mode & 0o666)  # safetensors lets nobody else read, whatever the umask
            hashed[name] = threads.submit(facts_of, path)
            synced.append(threads.submit(sync, path))
        for future in synced:
            future.result()
        return {name: asdict(future.result()) for name, future in hashed.items()}


def not_written(run_dir: Path, step: int, needed: int, error: Exception) -> UserError:
    """The error for a checkpoint of `needed` bytes that the disk has refused."""
    free = in_bytes(shutil.disk_usage(run_dir).free)
    return UserError(
        f"checkpoint {step} not written: {why_refused(error)} (needs {in_bytes(needed)}, {free} free)",
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
    for name in (*manifest.weights, *manifest.state, *manifest.texts):
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
    """Fills model and optimizer, which must be of the same shape, from a verified checkpoint. Of what is sharded, each
    rank reads its own rows."""
    manifest = read_manifest(path)
    load_weights(model, read_parts(path, manifest.weights), path)
    try:
        if manifest.progress is None:
            state, progress = read_state_1(path / STATE_1, optimizer)
        else:
            state, progress = read_parts(path, manifest.state), manifest.progress
        optim.load_state_tensors(optimizer, state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise unusable(path, f"state of another optimizer: {error}") from error
    return progress


def read_parts(directory: Path, names: list[str]) -> dict[str, Parts]:
    """Tensors mapped from one file or several, each with those of its parts that the files have. Raises UserError (3).

    What all ranks have, as the number of steps of an optimizer, is in the first file only."""
    tensors: dict[str, Parts] = {}
    for name in names:
        for key, part in read_safetensors(directory / name).items():
            tensors[key] = (*tensors.get(key, ()), part)
    return tensors


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
