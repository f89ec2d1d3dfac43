"""Loads what is evaluated: a model with the sha256 of its files, and the run that it comes from, if it is one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt import tokenizer
from gpt.config.places import stored
from gpt.errors import UserError
from gpt.evaluation import headlines
from gpt.evaluation.settings import EvaluateConfig
from gpt.files import hub_names
from gpt.files.atomic import sha256
from gpt.files.paths import PROJECT_ROOT
from gpt.generation import packed_model
from gpt.model import LanguageModel
from gpt.runs import checkpoint
from gpt.sweeps import jobs, named_runs
from gpt.tokenizer import Tokenizer

ELSEWHERE = PROJECT_ROOT / "outputs" / "evaluations"  # results of what is no run


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated. `run` and `settings` are those of the run of this project that it comes from."""

    name: str
    model: LanguageModel
    tokens: Tokenizer
    template: str | None
    step: int
    path: Path
    sha256: dict[str, str]
    run: Path | None
    settings: dict[str, Any]
    val_loss: float | None = None  # of the checkpoint, where its run has evaluated it
    precision: str = "float32"  # of the weights

    @property
    def folder(self) -> Path:
        """Where its results go."""
        if self.run:
            return self.run / headlines.FOLDER
        is_of_hub = hub_names.is_repository(self.name, PROJECT_ROOT)
        name = self.name.replace("/", "_") if is_of_hub else Path(self.name).name
        return ELSEWHERE / (name or "model")

    @property
    def origin(self) -> str | None:
        """The name of the weights that the run began with; None for random ones."""
        first = self.settings.get("init")
        name = first.get("from") if isinstance(first, dict) else None
        return name if isinstance(name, str) else None


def load(name: str, cfg: EvaluateConfig, device: torch.device) -> Subject:
    """The model that `name` names. Raises UserError for what cannot be loaded."""
    loaded, precision = packed_model.load(name, PROJECT_ROOT, device, vars(cfg.model), cfg.precision)
    run = run_of(loaded.path)
    steps = checkpoint.listed(run / "checkpoints") if run else []
    source = loaded.path if loaded.path in steps else steps[-1] if steps else None
    val_loss = checkpoint.read_manifest(loaded.path).val_loss if loaded.path in steps else None
    settings = checkpoint.read_config(source) if source else {}
    tokens = tokenizer.load(loaded.tokenizer_name)
    hashes = {path.name: sha256(path) for path in loaded.files}
    template = cfg.template or loaded.template
    shown = stored("checkpoint", str(run or name))
    about = template, loaded.step, loaded.path, hashes, run, settings, val_loss
    return Subject(shown, loaded.model, tokens, *about, precision)


def run_of(path: Path) -> Path | None:
    """The run that a checkpoint, last_model.pt or the adapter is of."""
    for place in (path.parent, path.parent.parent):
        if checkpoint.listed(place / "checkpoints"):
            return place
    return None


def names(cfg: EvaluateConfig) -> list[str]:
    """What is evaluated: the checkpoint, all of its run's, or all that are compared; of a sweep, its jobs. Raises
    UserError where nothing is named, or too much."""
    if bool(cfg.checkpoint) == bool(cfg.compare):
        remedy = "checkpoint=outputs/runs/mine, or compare=[outputs/runs/a,outputs/runs/b]"
        raise UserError("exactly one of checkpoint and compare is needed", remedy=remedy)
    if cfg.compare and cfg.checkpoints == "all":
        raise UserError("checkpoints=all is of one run, not of several", remedy="leave it out, or give checkpoint=")
    if cfg.compare:
        found: dict[Path, str] = {}  # the same twice, however it is written, would count as two seeds
        for place in (place for name in cfg.compare for place in _jobs(name)):
            found.setdefault((PROJECT_ROOT / place).resolve(), place)
        return list(found.values())
    name = named_runs.resolve(str(cfg.checkpoint))
    if cfg.checkpoints == "best":
        return [name]
    steps = checkpoint.listed(PROJECT_ROOT / name / "checkpoints")
    if not steps:
        raise UserError("no checkpoints of a run", str(cfg.checkpoint), "checkpoints=all needs a run directory")
    return list(map(str, steps))


def _jobs(name: str) -> list[str]:
    """The jobs of a sweep that have a checkpoint; anything else is itself."""
    folder = PROJECT_ROOT / name
    folders = [job.folder for job in jobs.read(folder)] if folder.is_dir() else []
    return [str(path) for path in folders if checkpoint.listed(path / "checkpoints")] or [name]
