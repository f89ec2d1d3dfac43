"""What a finished run leaves to people, beside its record and its checkpoints."""

from pathlib import Path

from gpt.config.schema import TrainConfig
from gpt.files.jsonl import read_rows
from gpt.model import GPT
from gpt.runs import model_card, model_file, peft_adapter
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import LAST_MODEL
from gpt.terminal import figures


def write(run_dir: Path, cfg: TrainConfig, model: GPT, identity: Identity, step: int, prepared: Path) -> None:
    """last_model.pt (adapters folded into the weights), adapter/ (alone, for peft), loss.png, README.md (model card).

    Raises UserError (5) when the model cannot be written.
    """
    model_file.save_model(run_dir / LAST_MODEL, model, identity, step)
    if identity.lora:
        peft_adapter.save(run_dir / "adapter", model, identity.lora, cfg.init.from_)
    rows = read_rows(run_dir / "metrics.jsonl")
    figures.loss_curve(rows, run_dir / "loss.png", title=f"{cfg.model.name} on {cfg.data.name}")
    model_card.write(run_dir / "README.md", cfg, rows, cfg.model.n_parameters(identity.vocab_size), prepared)
