"""Asks which of several answers is that to a question, by how likely the model finds each. This tells small models
apart where what they write does not."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gpt.config.fields import Count, section
from gpt.errors import UserError
from gpt.evaluation import statistics
from gpt.evaluation.registry import Kind

if TYPE_CHECKING:
    from gpt.evaluation.questions import Part
    from gpt.evaluation.statistics import Figure, Measure
    from gpt.evaluation.task import Task

CHANCE, SHORTEST = "chance", "shortest answer"
SUM, PER_BYTE = "accuracy", "accuracy per byte"


@section
class Evaluation(Kind):
    """evaluate=choice. Units are questions; the first option is the right one."""

    headline: ClassVar[str] = "accuracy per byte"

    distractors: Count

    def batches(self, task: Task) -> list[list[int]]:
        """A batch has the options of as many questions as have batch_size options."""
        options = self._options(task)
        at_once = max(1, task.batch_size // len(options[0]))
        return [list(range(i, min(i + at_once, len(options)))) for i in range(0, len(options), at_once)]

    def compute(self, task: Task, units: list[int]) -> list[dict[str, Any]]:
        """Of each option, the log-likelihood of its text and its bytes; the end of the text is not scored."""
        from gpt.evaluation import questions, scoring

        options = [self._options(task)[unit] for unit in units]
        pool = self._pool(task)
        pairs = [(task.part.prompt(unit), pool.questions[i].reference or "")
                 for unit, own in zip(units, options, strict=True) for i in own]  # fmt: skip
        texts = task.tokens.ids_of_each([text for _, text in pairs])
        split = questions.joined(
            [(np.array(prompt, task.tokens.dtype), text) for (prompt, _), text in zip(pairs, texts, strict=True)]
        )
        context = task.model.config.context_length
        scored = scoring.of_documents(
            task.model, split, range(len(pairs)), context, task.tokens.bytes_per_token(), task.batch_size * context
        )
        found, place = [], 0
        for own in options:
            here = scored[place : place + len(own)]
            place += len(own)
            found.append({"options": own, "log likelihood": [-row["nats"] for row in here],
                          "bytes": [row["bytes"] for row in here]})  # fmt: skip
        return found

    def finish(self, task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        part, pool = task.part, self._pool(task)
        return [
            {"id": part.ids[i], "instruction": part.questions[i].instruction,
             "options": [pool.ids[option] for option in row["options"]],
             "log likelihood": row["log likelihood"], "bytes": row["bytes"]}
            for i, row in enumerate(rows)
        ]  # fmt: skip

    def measures(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Measure]]:
        """Equally likely options share what is right."""
        likely = [np.array(row["log likelihood"]) for row in rows]
        sizes = [np.array(row["bytes"]) for row in rows]
        per_byte = [a / b for a, b in zip(likely, sizes, strict=True)]
        chance = [1 / len(row["options"]) for row in rows]
        bits = [-values[0] / math.log(2) for values in per_byte]
        margin = [values[0] - values[1:].max() for values in per_byte]
        return {
            "model": {
                SUM: statistics.mean([_share(values) for values in likely], True),
                PER_BYTE: statistics.mean([_share(values) for values in per_byte], True),
                "bits per byte of the right one": statistics.mean(bits),
                "nats per byte above the best wrong one": statistics.mean(margin),
            },
            CHANCE: {SUM: statistics.mean(chance), PER_BYTE: statistics.mean(chance)},
            SHORTEST: {SUM: statistics.mean([_share(-values.astype(float)) for values in sizes], True)},
        }

    def remarks(self, task: Task, rows: list[dict[str, Any]], figures: dict[str, dict[str, Figure]]) -> list[str]:
        chance = figures[CHANCE][SUM].value
        said = [f"chance is {chance:.4g}: one right answer among {self.distractors + 1}"]
        for name in (SUM, PER_BYTE):
            own = figures["model"][name]
            if own.low is not None and own.low <= chance <= own.high:
                said.append(f"{name} {own.value:.4g} cannot be told from chance with {len(rows)} questions")
            elif own.value < chance:
                said.append(f"{name} {own.value:.4g} is below chance")
        if figures["model"][SUM].value < figures[SHORTEST][SUM].value:
            said.append(f"below a baseline ({SHORTEST}): {SUM}")
        levels = [self._level(task, i, option) for i, own in enumerate(self._options(task)) for option in own[1:]]
        names = ("of the same focus", "of the same source", "of any question")
        shares = ", ".join(f"{levels.count(n)} {name}" for n, name in enumerate(names) if levels.count(n))
        return [*said, f"wrong answers: {shares}"]

    def _options(self, task: Task) -> list[list[int]]:
        """For each question its own number, then those of the questions whose answers are the wrong ones: of the same
        focus first, then of the same source, then any, in random order that depends on the seed and the question. They
        are of the whole part, also where only the first questions are asked."""

        def choose() -> list[list[int]]:
            part = task.part
            part.need_questions("choice")
            texts = [question.reference for question in self._pool(task).questions]
            n_texts = len(set(texts))
            if n_texts <= self.distractors:
                what = f"{n_texts} different answers are too few for {self.distractors} wrong ones beside the right one"
                fewer = f"set evaluate.choice.distractors={n_texts - 1}"
                raise UserError(what, part.source, fewer if n_texts > 1 else "give questions with different answers")
            return [self._drawn(task, i, texts) for i in range(len(part.questions))]

        return task.cached("options", choose)

    def _pool(self, task: Task) -> Part:
        return task.part.whole or task.part

    def _drawn(self, task: Task, number: int, texts: list[str | None]) -> list[int]:
        order = list(range(len(texts)))
        random.Random(f"{task.seed} {task.part.ids[number]}").shuffle(order)
        order.sort(key=lambda other: self._level(task, number, other))
        chosen, seen = [number], {texts[number]}
        for other in order:
            if len(chosen) <= self.distractors and texts[other] not in seen:
                chosen.append(other)
                seen.add(texts[other])
        return chosen

    def _level(self, task: Task, number: int, other: int) -> int:
        topics = self._pool(task).topics
        (focus, source), (others_focus, others_source) = topics[number], topics[other]
        return 0 if focus and focus == others_focus else 1 if source and source == others_source else 2


def _share(values: np.ndarray) -> float:
    """1 where the first is the largest alone, 1/k where it is one of k largest, else 0."""
    largest = values.max()
    return float(values[0] == largest) / int((values == largest).sum())
