"""Sets evaluations of several models beside each other, in pairs over the same questions."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config.schema import METRIC
from gpt.errors import UserError
from gpt.evaluation import record, statistics
from gpt.evaluation.running import Result, fitting
from gpt.evaluation.statistics import Difference, Figure, Measure
from gpt.files import atomic
from gpt.terminal import console

MOST_SHOWN = 60  # differences


@dataclass(frozen=True)
class Entry:
    """A model, or one setting with several seeds: what it has come to on the questions that all have in common."""

    name: str
    measures: list[dict[str, Measure]]  # of each seed


@dataclass(frozen=True)
class Comparison:
    """All differences of a kind of evaluation, the first of two entries minus the second."""

    kind: str
    n: int  # questions in common
    figures: dict[str, dict[str, Figure]]  # by entry and name
    differences: list[tuple[str, str, str, Difference]]  # name of the figure, first, second
    correlations: dict[str, Figure]  # of val/loss and each figure over models, of which enough have the same data


def compare(kind: str, settings: Any, found: Sequence[tuple[str, Result]], count: int, seed: int) -> Comparison:
    """Compares results of one kind, named by what they are of; several of one name are seeds. Raises UserError where
    questions differ: a score on easier ones would look better."""
    first = found[0][1]
    for _, result in found:
        if result.identity["questions"]["sha256"] != first.identity["questions"]["sha256"]:
            raise UserError(
                "not the same questions", f"{first.subject}: {first.identity['questions']['source']}, "
                f"{result.subject}: {result.identity['questions']['source']}",
                "give all of them the same: data=... or file=...",
            )  # fmt: skip
    rows = [{row["id"]: row for row in result.rows} for _, result in found]
    if kind == "loss" and any(own.keys() != rows[0].keys() for own in rows):
        remedy = "give models with contexts of one length, or data of several documents"
        raise UserError("not the same windows of one document", first.identity["questions"]["source"], remedy)
    shared = [name for name in rows[0] if all(name in own for own in rows)]
    if not shared:
        raise UserError("no question that all models have answered", kind, "their contexts are too short")
    entries: dict[str, Entry] = {}
    for (name, _), own in zip(found, rows, strict=True):
        measures = settings.measures([own[i] for i in shared])["model"]
        entries.setdefault(name, Entry(name, [])).measures.append(measures)
    weights = statistics.resamples(len(shared), count, seed)
    every = [measures for entry in entries.values() for measures in entry.measures]
    names = [name for name in every[0] if all(name in measures for measures in every)]
    figures = {entry.name: {name: _figure(entry, name, weights, seed) for name in names} for entry in entries.values()}
    differences = [
        (name, a.name, b.name,
         statistics.difference([m[name] for m in a.measures], [m[name] for m in b.measures], count, seed, weights))
        for a, b in itertools.combinations(entries.values(), 2) for name in names
    ]  # fmt: skip
    is_same_loss = len({result.identity.get("training") for _, result in found}) == 1  # val/loss is that of one data
    evaluated = [result for _, result in found if result.val_loss is not None and is_same_loss]
    pairs = [(result.val_loss, result.figures["model"]) for result in evaluated]
    correlations = {}
    for name in names:
        figure = statistics.rank_correlation([(loss, own[name].value) for loss, own in pairs], count, seed)
        if figure is not None:
            correlations[name] = figure
    return Comparison(kind, len(shared), figures, differences, correlations)


def _figure(entry: Entry, name: str, weights: np.ndarray, seed: int) -> Figure:
    measures = [own[name] for own in entry.measures]
    values = statistics.over_seeds(measures, weights, np.random.default_rng([seed, 1]))
    return Figure(float(np.mean([m.total() for m in measures])), *statistics.interval(values, weights.shape[1]))


def show(compared: Comparison) -> None:
    """Prints the figures beside each other, and the differences: all of them where they are not too many."""
    print(f"\n{compared.kind}: {compared.n} questions that all have answered")
    for columns, rows in fitting(compared.figures, console.width()):
        print(console.table(rows, columns))
    first = compared.differences[0][0] if len(compared.differences) > MOST_SHOWN else None
    for name, a, b, difference in compared.differences:
        if first in (None, name):
            print(console.escape(f"{name}: {a} minus {b}: {difference}"))
    if first:
        print(f"of the {len(compared.differences):,} differences, those in {first} are shown; all are in the file")
    for sentence in statistics.few(compared.n):
        print(sentence)
    for name, figure in compared.correlations.items():
        print(console.escape(f"rank correlation of {METRIC} and {name} over the models: {figure}"))


def write(compared: Comparison, folder: Path) -> Path:
    """<kind>.json in a folder."""
    content = {
        "kind": compared.kind, "questions": compared.n,
        "figures": record.as_json(compared.figures),
        "differences": [
            {"figure": name, "first": a, "second": b, **vars(d.figure), "p": d.p, "n_needed": d.n_needed,
             "distinguishable": d.is_distinguishable}
            for name, a, b, d in compared.differences
        ],
        "rank correlations with val/loss": {name: vars(f) for name, f in compared.correlations.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{compared.kind}.json"
    atomic.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
