"""The model card: the README.md beside a run's weights."""

import json
from pathlib import Path
from typing import Any

from gpt.schema import TrainConfig

DISCLAIMER = "Generated text can be wrong in every detail; as medical text it must not guide clinical decisions."


def write(path: Path, cfg: TrainConfig, rows: list[dict[str, Any]], n_parameters: int, prepared: Path) -> None:
    """Writes what was trained, on what, how well it does, and how to use it. `rows` are the run's metrics."""
    meta = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))
    m, train = cfg.model, meta["splits"]["train"]
    length = f"{rows[-1]['step']:,} steps, {rows[-1]['tokens']:,} tokens" if rows else "not recorded"
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
| trained for | {length} |
| optimizer | {cfg.optimizer.name}, learning rate {cfg.optimizer.lr:g}, {cfg.schedule.name} schedule, seed {cfg.seed} |

{validation(rows, cfg)}

![loss](loss.png)

    python generate.py checkpoint={path.parent} prompt="..."
""",
        encoding="utf-8",
    )


def validation(rows: list[dict[str, Any]], cfg: TrainConfig) -> str:
    """The best evaluation in words. There is none on record when the disk has refused metrics.jsonl."""
    evaluations = [row for row in rows if "val/loss" in row]
    if not evaluations:
        return "No evaluation is on record."
    best = min(evaluations, key=lambda row: row["val/loss"])
    bits = f", {best['val/bpb']:.4f} bits per byte" if "val/bpb" in best else ""
    return (
        f"Best validation: loss {best['val/loss']:.4f} nats per token{bits}, perplexity {best['val/perplexity']:.2f}, "
        f"at step {best['step']:,}, on {cfg.train.eval_tokens:,} held-out tokens (or all, if fewer)."
    )
