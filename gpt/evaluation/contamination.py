"""Says how many words in a row each question shares with training data, and splits scores by it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt.evaluation import overlap
from gpt.evaluation.questions import text_of
from gpt.evaluation.statistics import Figure, Measure
from gpt.evaluation.task import Task

CONTAMINATED = 13  # words in a row that a question shares with training data: the rule of GPT-3 (Brown et al., 2020)
SHARED, UNSHARED = "model, shared questions", "model, other questions"  # the model's scores on a part of the questions
UNKNOWN = "nothing is known of the training data: no overlap with it, no retrieval baseline"


def mark(task: Task, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of questions, each with the longest span of words that it and its reference share with the training
    split, None where that is not known, and whether the question occurs there."""
    known = task.cached("spans", lambda: spans(task))
    return [row | {"shared span": known[row["id"]][0], "in training": known[row["id"]][1]} for row in rows]


def spans(task: Task) -> dict[str, tuple[int | None, bool]]:
    """{question's name: (words of its longest shared span, whether training has the same question)}."""
    part = task.part
    if part.training is None:
        return dict.fromkeys(part.ids, (None, False))
    longest = overlap.longest_spans([text_of(question) for question in part.questions], part.training.texts)
    trained = {(question.instruction, question.input) for question in part.training.questions}
    is_known = [(question.instruction, question.input) in trained for question in part.questions]
    return dict(zip(part.ids, zip(longest, is_known, strict=True), strict=True))


def split(rows: Sequence[dict[str, Any]], measures: dict[str, Measure]) -> dict[str, dict[str, Measure]]:
    """The model's `measures` over the questions that share CONTAMINATED words or more, and over the others. Nothing
    where all of them are of one kind."""
    is_shared = np.array([(row["shared span"] or 0) >= CONTAMINATED for row in rows])
    if is_shared.all() or not is_shared.any():
        return {}
    return {
        name: {key: measure.where(kept) for key, measure in measures.items()}
        for name, kept in ((SHARED, is_shared), (UNSHARED, ~is_shared))
    }


def remark(rows: Sequence[dict[str, Any]], name: str, figures: dict[str, dict[str, Figure]]) -> str:
    """How many questions share a span with training data, and what the figure `name` is on these and on the others."""
    spans = [row["shared span"] for row in rows]
    if None in spans:
        return UNKNOWN
    n_shared = sum(span >= CONTAMINATED for span in spans)
    n_asked = sum(row["in training"] for row in rows)
    said = f"{n_shared} of {len(rows)} questions with their references share {CONTAMINATED} or more words in a row "
    said += f"with the training split (longest {max(spans)}); questions that occur in it: {n_asked}"
    if SHARED in figures:
        said += f"; {name} of these {figures[SHARED][name]}, of the others {figures[UNSHARED][name]}"
    return said
