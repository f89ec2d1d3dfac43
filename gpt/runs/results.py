"""Writes last_model.pt, adapter/, loss.png and README.md at the end of a run."""

from pathlib import Path
from typing import Any

from gpt import finetune
from gpt.files.jsonl import read_rows
from gpt.model import LanguageModel
from gpt.progress import Progress
from gpt.runs import model_card, model_file, peft_adapter
from gpt.runs.checkpoint import listed
from gpt.runs.model_file import LAST_MODEL
from gpt.runs.run import Run
from gpt.terminal import figures


def write(run: Run, model: LanguageModel, progress: Progress, data: dict[str, Any]) -> Path:
    """last_model.pt (adapters folded in), adapter/ (alone, for peft), loss.png, README.md (model card).

    `data` is the meta.json of what the run was trained on. Returns the path of the first. Raises UserError (5) when the
    model cannot be written.
    """
    cfg, identity, path = run.cfg, run.identity, run.directory / LAST_MODEL
    newest = next(reversed(listed(run.directory / "checkpoints")), None)  # where the weights are, if they are sharded
    model_file.save_model(path, model, identity, progress.step, newest)
    is_public = cfg.model.family in peft_adapter.PREFIXES and not cfg.model.unpublished()
    if identity.lora and is_public:  # peft puts adapters into a model of transformers
        adapter = run.directory / "adapter"
        peft_adapter.save(adapter, model, identity.lora, cfg.init.from_, cfg.init.revision, newest)
        if cfg.init.from_ and identity.tokenizer != "bytes" and not peft_adapter.can_load(cfg.init.from_):
            peft_adapter.say_how(adapter, cfg.init.from_)
    rows = read_rows(run.directory / "metrics.jsonl")
    figures.loss_curve(rows, run.directory / "loss.png", title=f"{cfg.model.name} on {cfg.data.name}")
    model_card.write(run.directory / "README.md", cfg, rows, finetune.n_plain(model), data)
    return path
