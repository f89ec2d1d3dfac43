"""Runs one kind of evaluation on one model: batch after batch, each kept as soon as it is computed."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.config.schema import as_dict
from gpt.evaluation import questions, record, similarity, statistics
from gpt.evaluation.record import Record
from gpt.evaluation.settings import EvaluateConfig
from gpt.evaluation.statistics import Figure
from gpt.evaluation.task import Task
from gpt.terminal import console

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What an evaluation has come to, and where it is: `path`, and the rows of questions beside it."""

    kind: str
    subject: str
    step: int
    path: Path
    identity: dict[str, Any]
    figures: dict[str, dict[str, Figure]]
    remarks: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return record.read_rows(self.path.with_suffix(".jsonl"))


def evaluate(kind: str, settings: Any, task: Task, cfg: EvaluateConfig) -> Result:
    """The result of an evaluation, from the disk where it is there already. Raises UserError for what cannot be
    evaluated."""
    subject = task.subject
    identity = {
        "kind": kind, "settings": as_dict(settings), "step": subject.step, "weights": subject.sha256,
        "template": subject.template, "tokenizer": subject.tokens.name,
        "questions": questions.shown(task.part),
        "training": task.part.training.data.meta["fingerprint"] if task.part.training else None,
        "batch_size": cfg.batch_size, "resamples": cfg.resamples, "seed": cfg.seed,
        "device": str(task.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    name = "_".join([cfg.name or kind, *([] if cfg.name or cfg.file else [cfg.part]), f"step_{subject.step:08d}"])
    own = Record(subject.folder, name, identity)
    content = own.finished()
    if content is None:
        for number, units in enumerate(batches := settings.batches(task)):
            if not own.computed(number):
                own.add(number, units, settings.compute(task, units))
                console.progress(f"{kind}: batch {number + 1} of {len(batches)}")
        console.progress("")
        rows = settings.finish(task, own.rows())
        figures = statistics.figures(settings.measures(rows), cfg.resamples, cfg.seed)
        content = {"figures": record.as_json(figures), "remarks": settings.remarks(task, rows, figures)}
        if kind == "answers":
            content["signatures"] = similarity.signatures()
        content = own.publish(rows, content)
    else:
        log.info(f"{own.path.name} is there already, for the same weights, questions and settings")
    figures = record.from_json(content["figures"])
    return Result(kind, subject.name, subject.step, own.path, identity, figures, content["remarks"])


def show(result: Result) -> None:
    """Prints what was scored, on what, and the table."""
    weights = ", ".join(f"{name} sha256 {digest}" for name, digest in result.identity["weights"].items())
    asked = result.identity["questions"]
    print("\n" + console.escape(f"{result.kind}: {result.subject}, step {result.step}, {weights}"))
    print(console.escape(f"on {asked['source']}: {asked['documents']} documents, sha256 {asked['sha256']}"))
    print("\n\n".join(console.table(rows, columns) for columns, rows in fitting(result.figures, console.width())))
    for sentence in result.remarks:
        print(console.escape(sentence))
    print(console.escape(str(result.path)), flush=True)


def fitting(figures: dict[str, dict[str, Figure]], width: int) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """Columns and rows of as many tables below each other as it takes for no figure to be cut at this width."""
    columns, rows = record.table(figures)
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns}
    shown = columns[:1]
    for name in columns[1:]:
        if len(shown) > 1 and sum(widths[other] + 2 for other in [*shown, name]) - 2 > width:
            yield shown, [row for row in rows if any(other in row for other in shown[1:])]
            shown = columns[:1]
        shown.append(name)
    yield shown, [row for row in rows if any(other in row for other in shown[1:])]
