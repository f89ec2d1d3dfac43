"""The model card: the README.md beside a run's weights."""

import json
from pathlib import Path
from typing import Any

from gpt.schema import TrainConfig

DISCLAIMER = "Generated text can be wrong in every detail; as medical text it must not guide clinical decisions."


def write(path: Path, cfg: TrainConfig, rows: list[dict[str, Any]], n_parameters: int, prepared: Path) -> None:
    """Writes what was trained, on what, how well it does, and how to use it. `rows` are the run's metrics."""
    meta = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))
    evaluations = [row for row in rows if "val/loss" in row]
    best, last = min(evaluations, key=lambda row: row["val/loss"]), rows[-1]
    m, train = cfg.model, meta["splits"]["train"]
    path.write_text(
        f"""\
# {m.name} GPT on {cfg.data.card.title}

{DISCLAIMER}

| | |
|---|---|
| architecture | GPT-2: {m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, context {m.context_length} tokens |
| parameters | {n_parameters:,} |
| tokenizer | {meta["tokenizer"]}, {meta["n_vocab"]:,} tokens |
| prompt template | {"none, plain text" if cfg.data.kind == "text" else cfg.data.template} |
| training data | {train["documents"]:,} documents, {train["tokens"]:,} tokens; fingerprint {meta["fingerprint"][:12]} |
| licence of the data | {cfg.data.card.license} |
| citation | {cfg.data.card.citation} |
| trained for | {last["step"]:,} steps, {last["tokens"]:,} tokens |
| optimizer | {cfg.optimizer.name}, learning rate {cfg.optimizer.lr:g}, {cfg.schedule.name} schedule, seed {cfg.seed} |

Best validation: loss {best["val/loss"]:.4f} nats per token, {best["val/bpb"]:.4f} bits per byte, perplexity
{best["val/perplexity"]:.2f}, at step {best["step"]:,}, on {cfg.train.eval_tokens:,} held-out tokens (or all, if fewer).

![loss](loss.png)

    python generate.py checkpoint={path.parent} prompt="..."
""",
        encoding="utf-8",
    )
