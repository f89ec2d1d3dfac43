"""Saves a run's checkpoints as it goes on, and forgives a disk that refuses one now and then."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt.config.schema import TrainConfig
from gpt.errors import ENVIRONMENT, NUMERICAL, UserError
from gpt.files import atomic, directory
from gpt.machine.ranks import ALONE, Ranks
from gpt.machine.sizes import count_sizes, state_bytes
from gpt.model import LanguageModel
from gpt.optim import Optimizer
from gpt.progress import Progress
from gpt.runs.checkpoint import (
    MANIFEST,
    Identity,
    hash_json,
    is_valid,
    listed,
    not_written,
    prune,
    publish,
    read_manifest,
    remove,
)  # fmt: skip

log = logging.getLogger(__name__)

FAILURES = 3  # checkpoints in a row that could not be written, before the run ends


class Saver:
    """Publishes the checkpoints of a run. That one cannot be written is forgiven, but not three times in a row. All
    ranks call it; the first one writes, or all of them where the model is sharded.

    Used as a context manager; an error that stops the run for its numbers (4) then names the last good checkpoint.
    """

    def __init__(
        self, run_dir: Path, model: LanguageModel, optimizer: Optimizer, identity: Identity, config: dict[str, Any],
        keep: int, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._folder, self._keep = run_dir / "checkpoints", keep
        # The ranks of which the first decides and writes for all, and those that decide and write together.
        self._led, self._joined = (ALONE, ranks) if ranks.is_sharded else (ranks, ALONE)
        self._publish = lambda progress, best: publish(
            run_dir, model, optimizer, progress, identity, config, best=best, ranks=self._joined
        )
        self._failures, self._failed_step = 0, -1
        self._saved: tuple[Progress, float | None, Path] | None = None  # what the newest checkpoint says
        self._unconfirmed: Path | None = None  # no evaluation, or none of its samples, is on record yet

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError) and error.code == NUMERICAL:
            if self._unconfirmed and self._joined.is_first:  # its evaluation is not finite
                remove(self._unconfirmed)
            error.remedy = "; ".join(filter(None, [error.remedy, f"last good checkpoint: {self.newest()}"]))

    def save_first(self, progress: Progress, best: float | None = None) -> None:
        """Publishes the checkpoint of a step whose evaluation or samples are still to come, marked with its validation
        loss if that is known to be the `best`. `save` follows; until then no older checkpoint is removed."""
        self._led.first(lambda: self._save_first(progress, best))

    def _save_first(self, progress: Progress, best: float | None) -> None:
        self._unconfirmed = self._write(progress, best, forgive=True)

    def save(self, progress: Progress, forgive: bool = True) -> Path | None:
        """The path of the checkpoint, or None with a warning. Raises UserError (5) for what is not forgiven."""
        path = self._led.first(lambda: self._save(progress, forgive))
        return Path(path) if path else None

    def _save(self, progress: Progress, forgive: bool) -> str | None:
        best = progress.best if progress.best_step == progress.step else None
        if path := self._write(progress, best, forgive):
            self._unconfirmed = None
            self._joined.first(prune, self._folder, self._keep, progress.step)
        return str(path) if path else None

    def _write(self, progress: Progress, best: float | None, forgive: bool) -> Path | None:
        """Publishes a checkpoint. Where that of this step is there, only what it says of itself is replaced."""
        if self._saved and self._saved[:2] == (progress, best):
            return self._saved[2]
        if forgive and self._failed_step == progress.step:
            return None  # once a step is enough
        path = self._folder / f"step_{progress.step:08d}"
        try:
            if self._saved and self._saved[0].step == progress.step:
                self._joined.first(mark, path, progress, best)
            elif not self._joined.first(is_of, path, progress):
                path = self._publish(progress, best)
        except UserError as error:
            self._failures, self._failed_step = self._failures + 1, progress.step
            if error.code != ENVIRONMENT or self._failures == FAILURES or not forgive:
                raise
            n_valid = self._joined.first(lambda: sum(map(is_valid, listed(self._folder))))
            log.warning(f"{error.what}; training continues, {n_valid} valid checkpoints")
            return None
        self._failures, self._saved = 0, (progress, best, path)
        return path

    def newest(self) -> str:
        """The name of the newest valid checkpoint, for people."""
        return next((path.name for path in reversed(listed(self._folder)) if is_valid(path)), "none")


def is_of(path: Path, progress: Progress) -> bool:
    """Whether a checkpoint of this very progress is there: the run ended before its next step."""
    return is_valid(path) and read_manifest(path).progress == progress


def mark(path: Path, progress: Progress, best: float | None) -> None:
    """Replaces, atomically, what a checkpoint says of itself at the same step: its progress, and the validation loss if
    it is the best. Raises UserError (5), with the checkpoint as it was, when the disk refuses."""
    content = asdict(read_manifest(path)) | {"progress": asdict(progress), "val_loss": best}
    try:
        manifest = {"content": content, "sha256": hash_json(content)}
        atomic.write(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise not_written(path.parent.parent, progress.step, 0, error) from error


def check_space(run_dir: Path, cfg: TrainConfig, vocab_size: int) -> None:
    """Raises UserError (5) when the disk has no room for the checkpoints that a run will keep and the one being
    written, less those that are there."""
    sizes = count_sizes(cfg.model, cfg.finetune, vocab_size)
    size = 4 * sizes.held + state_bytes(cfg.model, cfg.finetune, vocab_size, cfg.optimizer, cfg.train.ema)
    n_wanted = cfg.train.keep_checkpoints + 1 - len(listed(run_dir / "checkpoints"))
    directory.check_space(run_dir, max(1, n_wanted), size)
