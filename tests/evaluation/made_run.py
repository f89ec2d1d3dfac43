"""A run with prepared data and checkpoints, made in a second, and settings of an evaluation of it."""

from pathlib import Path
from typing import Any

import torch
from conftest import adamw_config, data_config, model_config

from gpt import optim, tokenizer
from gpt.config.schema import as_dict
from gpt.data import preparation
from gpt.evaluation.registry import kinds
from gpt.evaluation.settings import EvaluateConfig
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint
from gpt.runs.checkpoint import Identity

BYTES = tokenizer.load("bytes")
MODEL = model_config(context_length=96, n_embd=32)
TOPICS = ("Croup", "Asthma", "Gout", "Mumps", "Lupus", "Rabies", "Scurvy", "Polio", "Cholera", "Anthrax")
ASKED = ("What causes {} ?", "What is {} ?", "How is {} treated ?")


def data(folder: Path, test_fraction: float = 0.3) -> Any:
    """The settings of prepared data of 30 questions on 10 topics."""
    rows = [
        f"{question.format(topic)},{topic} answer number {i} of kind {j} is rest and water,source {i % 2},{topic}"
        for i, topic in enumerate(TOPICS) for j, question in enumerate(ASKED)
    ]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join(["question,answer,source,focus_area", *rows]) + "\n")
    return data_config(
        name="topics", path=str(folder / "rows.csv"), prepared_dir=str(folder / "data"), template="plain",
        val_fraction=0.2, test_fraction=test_fraction,
    )  # fmt: skip


def make(folder: Path, name: str = "run", seed: int = 0, steps: tuple[int, ...] = (3,), **changes: Any) -> Path:
    """The directory of a run whose weights are random; `changes` are to the settings of its data."""
    cfg = data(folder, **changes)
    prepared = preparation.ensure(cfg, folder)
    settings = {"data": as_dict(cfg) | {"fingerprint": prepared.meta["fingerprint"]}, "seed": seed}
    torch.manual_seed(seed)
    model = GPT(MODEL, BYTES.n_vocab)
    for step in steps:
        with torch.no_grad():
            model.wpe.weight.mul_(3)  # else an untrained model repeats its last token for ever
        progress = Progress(step=step, best=2.0, best_step=steps[-1])
        identity = Identity(MODEL, BYTES.n_vocab, "bytes", "plain")
        optimizer = optim.build(model, adamw_config())
        checkpoint.publish(folder / name, model, optimizer, progress, identity, settings, keep=None)
    return folder / name


def settings(*kinds_wanted: str, **changes: Any) -> EvaluateConfig:
    """An evaluation by some kinds. Changes of a kind's own settings are given under its name."""
    own = {
        "loss": {"stride": None, "end_of_text_first": False},
        "answers": {"max_new_tokens": 12, "temperature": 0.0, "top_k": None, "top_p": None,
                    "baselines": ["bm25", "frequent", "another", "base"]},
        "choice": {"distractors": 2},
        "tasks": {"names": ["facts"], "folder": None, "num_fewshot": 0, "limit": None},
    }  # fmt: skip
    chosen = {name: kinds()[name](**own[name] | changes.pop(name, {})) for name in kinds_wanted}
    wandb = {"mode": "disabled", "project": "p", "entity": None, "group": None, "tags": [], "log_model": "none"}
    return EvaluateConfig(**{
        "evaluate": chosen, "checkpoint": None, "compare": [], "checkpoints": "best",
        "model": {"n_head": None, "gelu": None}, "data": None, "part": "test", "file": None, "n_questions": None,
        "template": None, "name": None, "batch_size": 4, "resamples": 500, "seed": 1, "wandb": wandb, "device": "cpu",
        "precision": "float32", "threads": None, **changes,
    })  # fmt: skip
