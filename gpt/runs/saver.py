"""Saves a run's checkpoints as it goes on, and forgives a disk that refuses one now and then."""

import logging
from pathlib import Path
from typing import Any

from gpt import optim
from gpt.config.schema import TrainConfig
from gpt.errors import ENVIRONMENT, NUMERICAL, UserError
from gpt.files import directory
from gpt.machine.sizes import count_sizes
from gpt.model import LanguageModel
from gpt.optim import Optimizer
from gpt.progress import Progress
from gpt.runs.checkpoint import Identity, is_valid, listed, prune, publish, read_manifest

log = logging.getLogger(__name__)

FAILURES = 3  # checkpoints in a row that could not be written, before the run ends


class Saver:
    """Publishes the checkpoints of a run. That one cannot be written is forgiven, but not three times in a row.

    Used as a context manager; an error that stops the run for its numbers (4) then names the last good checkpoint.
    """

    def __init__(
        self, run_dir: Path, model: LanguageModel, optimizer: Optimizer, identity: Identity, config: dict[str, Any],
        keep: int,
    ) -> None:  # fmt: skip
        self._folder, self._keep = run_dir / "checkpoints", keep
        self._publish = lambda progress: publish(run_dir, model, optimizer, progress, identity, config, keep)
        self._failures = 0
        self._saved: tuple[Progress, Path] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError) and error.code == NUMERICAL:
            error.remedy = "; ".join(filter(None, [error.remedy, f"last good checkpoint: {self.newest()}"]))

    def save(self, progress: Progress, forgive: bool = True) -> Path | None:
        """The path of the checkpoint, or None with a warning. Raises UserError (5) for what is not forgiven."""
        if self._saved and self._saved[0] == progress:
            return self._saved[1]
        there = self._folder / f"step_{progress.step:08d}"
        if is_valid(there) and read_manifest(there).progress == progress:  # the run ended before its next step
            prune(self._folder, self._keep, progress.step)
            return there
        try:
            path = self._publish(progress)
        except UserError as error:
            self._failures += 1
            if error.code != ENVIRONMENT or self._failures == FAILURES or not forgive:
                raise
            n_valid = sum(map(is_valid, listed(self._folder)))
            log.warning(f"{error.what}; training continues, {n_valid} valid checkpoints")
            return None
        self._failures, self._saved = 0, (progress, path)
        return path

    def newest(self) -> str:
        """The name of the newest valid checkpoint, for people."""
        return next((path.name for path in reversed(listed(self._folder)) if is_valid(path)), "none")


def check_space(run_dir: Path, cfg: TrainConfig, vocab_size: int) -> None:
    """Raises UserError (5) when the disk has no room for the checkpoints that a run will keep and the one being
    written, less those that are there."""
    sizes = count_sizes(cfg.model, cfg.finetune, vocab_size)
    size = 4 * (sizes.held + sizes.trained * optim.TENSORS_PER_PARAMETER[cfg.optimizer.name])
    n_wanted = cfg.train.keep_checkpoints + 1 - len(listed(run_dir / "checkpoints"))
    directory.check_space(run_dir, max(1, n_wanted), size)
