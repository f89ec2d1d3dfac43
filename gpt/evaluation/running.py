"""Runs one kind of evaluation on one model: batch after batch, each kept as soon as it is computed."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.config.schema import as_dict
from gpt.errors import Interrupted
from gpt.evaluation import contamination, questions, record, statistics
from gpt.evaluation.record import Record
from gpt.evaluation.settings import EvaluateConfig
from gpt.evaluation.statistics import Figure
from gpt.evaluation.task import Task
from gpt.runs import model_card, run_log
from gpt.terminal import console, figures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What an evaluation has come to, and where it is: `path`, and the rows of questions beside it."""

    kind: str
    subject: str
    step: int
    path: Path
    val_loss: float | None  # of the checkpoint, where its run has evaluated it
    identity: dict[str, Any]
    figures: dict[str, dict[str, Figure]]
    headline: str  # the name of the figure that stands for all
    remarks: list[str]
    rows: list[dict[str, Any]]  # another model with the same name may replace the files before they are compared


def evaluate(kind: str, settings: Any, task: Task, cfg: EvaluateConfig) -> Result:
    """The result of an evaluation, from the disk where it is there already. Raises UserError for what cannot be
    evaluated."""
    subject, asked = task.subject, settings.asked(task)
    identity = {
        "kind": kind, "settings": as_dict(settings), "step": subject.step, "weights": subject.sha256,
        "template": subject.template, "tokenizer": subject.tokens.name,
        **(asked or asked_of_data(task)),
        "batch_size": cfg.batch_size, "resamples": cfg.resamples, "seed": cfg.seed,
        "device": str(task.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    about = cfg.name or (cfg.part if not cfg.file and not asked else None)
    fewer_bits = None if subject.precision == "float32" else subject.precision
    if fewer_bits:
        identity["precision"] = fewer_bits
    name = "_".join(filter(None, [kind, about, fewer_bits, f"step_{subject.step:08d}"]))
    own = Record(subject.folder, name, identity)
    content = own.finished()
    if content is None:
        compute(kind, settings, task, own)
        rows = settings.finish(task, own.rows())
        measures, parts = settings.measures(rows), {}
        headline = settings.headline or next(iter(measures["model"]))
        has_questions = not asked and bool(task.part.questions)
        if has_questions:
            rows = contamination.mark(task, rows)
            parts = contamination.split(rows, measures["model"])
        scored = statistics.figures(measures | parts, cfg.resamples, cfg.seed)
        remarks = settings.remarks(task, rows, {name: scored[name] for name in measures})
        if has_questions:
            remarks += [*statistics.few(len(rows)), contamination.remark(rows, headline, scored)]
        content = {"figures": record.as_json(scored), "remarks": remarks, "headline": headline}
        content["notice"] = model_card.notice(subject.settings).strip()
        content = own.publish(rows, content | settings.recorded())
    else:
        log.info(f"{own.path.name} is there already, for the same weights, questions and settings")
    scored = record.from_json(content["figures"])
    return Result(
        kind,
        subject.name,
        subject.step,
        own.path,
        subject.val_loss,
        identity,
        scored,
        content["headline"],
        content["remarks"],
        record.read_rows(own.rows_path),
    )


def asked_of_data(task: Task) -> dict[str, Any]:
    """What results say of the questions of data, for the kinds that do not say it themselves by `asked(task)`."""
    training = task.part.training
    return {
        "questions": questions.shown(task.part),
        "training": training.data.meta["fingerprint"] if training else None,
    }


def compute(kind: str, settings: Any, task: Task, own: Record) -> None:
    """Computes the batches that are not in the record yet. Raises Interrupted with what is kept."""
    batches = settings.batches(task)
    try:
        for number, units in enumerate(batches):
            if not own.computed(number):
                own.add(number, units, settings.compute(task, units))
                console.progress(f"{kind}: batch {number + 1} of {len(batches)}")
    except Interrupted as signal:
        kept = sum(own.computed(number) for number in range(len(batches)))
        what = f"{kept} of {len(batches)} batches of {kind} are kept; the same command goes on"
        raise Interrupted(signal.code - 128, what) from None
    finally:
        console.progress("")


def mirror(found: Sequence[Result], cfg: EvaluateConfig) -> None:
    """What is found of one model, or of the checkpoints of one run, to W&B, a row for each step."""
    tables, by_step = {}, {}
    for result in sorted(found, key=lambda result: result.step):
        row = by_step.setdefault(result.step, {"step": result.step})
        row |= {f"{result.kind}/{name}": figure.value for name, figure in result.figures["model"].items()}
        columns, lines = record.table(result.figures)
        tables[f"{result.kind} at step {result.step}"] = columns, [[row.get(c, "") for c in columns] for row in lines]
    config = {result.kind: result.identity for result in found}
    folder, name = found[0].path.parent, Path(found[0].subject).name
    run_log.evaluation(folder, name, cfg.wandb, config, list(by_step.values()), tables)


def draw(found: Sequence[Result]) -> None:
    """A picture for each kind: its headline figure over the steps of training, with those of baselines as lines."""
    for kind in dict.fromkeys(result.kind for result in found):
        own = [result for result in found if result.kind == kind]
        name = own[0].headline
        figures_of = [(result.step, result.figures["model"][name]) for result in own]
        points = [(step, f.value, f.value if f.low is None else f.low, f.value if f.high is None else f.high)
                  for step, f in figures_of]  # fmt: skip
        levels = {system: f[name].value for system, f in own[-1].figures.items()
                  if system not in ("model", contamination.SHARED, contamination.UNSHARED) and name in f}  # fmt: skip
        path = own[0].path.with_name(f"{kind}_over_training.png")
        figures.over_steps(points, levels, path, f"{kind}: {name}")
        print(console.escape(str(path)))


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


def fitting(scored: dict[str, dict[str, Figure]], width: int) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """Columns and rows of as many tables below each other as it takes for no figure to be cut at this width."""
    columns, rows = record.table(scored)
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns}
    shown = columns[:1]
    for name in columns[1:]:
        if len(shown) > 1 and sum(widths[other] + 2 for other in [*shown, name]) - 2 > width:
            yield shown, [row for row in rows if any(other in row for other in shown[1:])]
            shown = columns[:1]
        shown.append(name)
    yield shown, [row for row in rows if any(other in row for other in shown[1:])]
