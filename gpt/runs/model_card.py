"""Writes the model card, the README.md beside a run's weights, and what that of an export shares with it.

Settings are those of a run, as its config.yaml and its checkpoints have them. What they lack is "not recorded".
"""

import math
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt.config.data import DISCLAIMER
from gpt.config.families import ModelConfig
from gpt.config.schema import METRIC, TrainConfig, as_dict
from gpt.files import paths
from gpt.terminal.console import count, escape

UNKNOWN = "not recorded"


def write(path: Path, cfg: TrainConfig, rows: list[dict[str, Any]], n_parameters: int, meta: dict[str, Any]) -> None:
    """Writes what was trained, on what, how well it does, and how to use it. `rows` are the run's metrics, `meta` is
    what the meta.json of its data said when it was opened."""
    train, settings = meta["splits"]["train"], as_dict(cfg)
    counted = f"{count(train['documents'], 'document')}, {count(train['tokens'], 'token')}"
    facts = {
        **architecture(cfg.model, n_parameters),
        "tokenizer": f"{meta['tokenizer']}, {meta['n_vocab']:,} tokens",
        "prompt template": template(None if cfg.data.kind == "text" else cfg.data.template),
        "training data": f"{counted}; fingerprint {meta['fingerprint'][:12]}",
        **provenance(settings),
        "trained for": f"{count(rows[-1]['step'], 'step')}, {count(rows[-1]['tokens'], 'token')}" if rows else UNKNOWN,
    }
    path.write_text(
        f"""\
# {cfg.model.name} GPT on {cfg.data.card.title}

{notice(settings)}
{table(facts)}

{validation(rows, settings)}

![loss](loss.png)

    python generate.py {shlex.quote(f"checkpoint={paths.shareable(path.parent)}")} prompt="..."
""",
        encoding="utf-8",
    )


def notice(settings: dict[str, Any]) -> str:
    """A line on what the model writes: the notice of its data, the general one where no card is known, or nothing."""
    text = setting(settings, "data.card.notice")
    return "" if text is None else f"{DISCLAIMER if text == UNKNOWN else shown(text)}\n"


def architecture(config: ModelConfig, n_parameters: int) -> dict[str, str]:
    """Family and shape; the keys that only this family has by their names."""
    c, head = config, "the token embedding" if config.tie_weights else "a matrix of its own"
    shape = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.context_length} tokens"
    own = vars(config).keys() - {field.name for field in fields(ModelConfig)}
    more = "".join(f"{name} {shown(getattr(config, name))}, " for name in sorted(own))
    return {"architecture": f"{c.family}: {shape}; {more}head {head}", "parameters": f"{n_parameters:,}"}


def template(name: str | None) -> str:
    return name or "none, plain text"


def provenance(settings: dict[str, Any]) -> dict[str, str]:
    """Where data and weights come from."""
    first = shown(setting(settings, "init.from") or "random")
    optimizer, lr, schedule, seed = (
        shown(setting(settings, key)) for key in ("optimizer.name", "optimizer.lr", "schedule.name", "seed")
    )
    how = f"{optimizer}, learning rate {lr}, {schedule} schedule, seed {seed}"
    return {
        "licence of the data": shown(setting(settings, "data.card.license")),
        "citation": shown(setting(settings, "data.card.citation")),
        "first weights": paths.shareable(first) if first.startswith(("/", "~")) else first,
        "trained weights": trained_weights(settings),
        "optimizer": UNKNOWN if optimizer == UNKNOWN else how,
    }


def trained_weights(settings: dict[str, Any]) -> str:
    """Which part of the model has learned."""
    name = setting(settings, "finetune.name") if setting(settings, "finetune") else "full"
    if name == "lora":
        rank, alpha, targets = (shown(setting(settings, f"finetune.{key}")) for key in ("rank", "alpha", "targets"))
        return f"adapters (LoRA) of rank {rank}, alpha {alpha}, on {targets}; merged"
    if name == "last_blocks":
        return f"the last {shown(setting(settings, 'finetune.n_blocks'))} blocks"
    return "all" if name == "full" else UNKNOWN


def validation(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The best evaluation in words. There is none on record when the disk has refused metrics.jsonl."""
    best = best_row(rows)
    if best is None:
        return "No evaluation is on record."
    first = min(evaluated(rows), key=lambda row: row["step"])
    worse = f" The first weights were better: {measured(first)}." if first[METRIC] < best[METRIC] else ""
    return f"Best validation: {measured(best)}, at step {best['step']:,}, {held_out(settings)}.{worse}"


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the best evaluation, by the rule of gpt/progress.py: step 0, of which there is no checkpoint, is the
    best only as long as it is the only one. A run stops at an infinite loss, and keeps no checkpoint of it."""
    return min(evaluated(rows), key=lambda row: (row[METRIC] == math.inf, row["step"] == 0, row[METRIC]), default=None)


def evaluated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of evaluations."""
    losses = [row for row in rows if isinstance(row.get(METRIC), int | float) and isinstance(row.get("step"), int)]
    return [row for row in losses if not math.isnan(row[METRIC])]


def measured(row: dict[str, Any]) -> str:
    """An evaluation's figures."""
    bits = f", {row['val/bpb']:.4f} bits per byte" if isinstance(row.get("val/bpb"), float) else ""
    perplexity = f", perplexity {row['val/perplexity']:.2f}" if isinstance(row.get("val/perplexity"), float) else ""
    return f"loss {row[METRIC]:.4f} nats per token{bits}{perplexity}"


def held_out(settings: dict[str, Any]) -> str:
    """What an evaluation is on."""
    number = setting(settings, "train.eval_tokens")
    return f"on {number:,} held-out tokens (or all, if fewer)" if isinstance(number, int) else "on held-out tokens"


def setting(settings: dict[str, Any], key: str) -> Any:
    """The value of a key such as "data.card.title", UNKNOWN where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part, UNKNOWN) if isinstance(value, dict) else UNKNOWN
    return value


def shown(value: Any) -> str:
    """Any value on one line, which cannot end a table's cell."""
    if isinstance(value, float):
        return f"{value:g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return escape(" ".join(text.split())).replace("|", "\\|")


def table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())])
