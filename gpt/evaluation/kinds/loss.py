"""Scores a text by its likelihood: loss, perplexity, bits per byte and perplexity of words, each target once."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gpt.config.fields import Count, Flag, section
from gpt.evaluation import statistics
from gpt.evaluation.registry import Kind

if TYPE_CHECKING:
    from gpt.evaluation.statistics import Figure, Measure
    from gpt.evaluation.task import Task

UNIGRAM = "unigram baseline"


@section
class Evaluation(Kind):
    """evaluate=loss. Units are windows of at most a context."""

    headline: ClassVar[str] = "loss"

    stride: Count | None
    end_of_text_first: Flag

    def batches(self, task: Task) -> list[list[int]]:
        from gpt.evaluation import scoring

        _, segments = self._windows(task)
        return scoring.grouped(segments, task.batch_size * task.model.config.context_length)

    def compute(self, task: Task, units: list[int]) -> list[dict[str, Any]]:
        from gpt.evaluation import scoring

        split, segments = self._windows(task)
        return scoring.score(task.model, split, segments, units, task.tokens.bytes_per_token())

    def finish(self, task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each question or document, or for each window of a text that is one document: there is nothing else
        to resample."""
        split, segments = self._windows(task)
        document = np.searchsorted(split.documents[:, 2], segments.end)
        units = (np.arange(len(rows)) if _is_text(task.part) else document).tolist()
        merged: dict[int, dict[str, Any]] = {}
        for unit, row, unigram in zip(units, rows, self._unigram(task, split, segments), strict=True):
            row = row if unigram is None else row | {UNIGRAM: unigram}
            sums = merged.setdefault(unit, dict.fromkeys(row, 0))
            for key, value in row.items():
                sums[key] += value
        counts = self._words(task, split, list(merged.values()))
        names = task.part.ids or list(map(str, range(len(counts))))
        if _is_text(task.part):  # a model with another context has other windows
            names = [f"tokens {a}-{b}" for a, b in zip(segments.scored_from, segments.end, strict=True)]
        return [{"id": names[unit]} | merged[unit] | {"words": counts[unit]} for unit in sorted(merged)]

    def measures(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Measure]]:
        nats, tokens, text, n_bytes, words = (
            [row[key] for row in rows] for key in ("nats", "tokens", "text nats", "bytes", "words")
        )
        own = {
            "loss": statistics.ratio(nats, tokens),
            "perplexity": statistics.ratio(nats, tokens, np.exp),
            "bits per byte": statistics.ratio(text, n_bytes, lambda x: x / math.log(2)),
            "perplexity of words": statistics.ratio(text, words, np.exp),
        }
        found = {"model": own}
        if UNIGRAM in rows[0]:
            unigram = [row[UNIGRAM] for row in rows]
            found[UNIGRAM] = {
                "loss": statistics.ratio(unigram, tokens),
                "perplexity": statistics.ratio(unigram, tokens, np.exp),
            }
        return found

    def remarks(self, task: Task, rows: list[dict[str, Any]], figures: dict[str, dict[str, Figure]]) -> list[str]:
        sums = {key: sum(row[key] for row in rows) for key in ("tokens", "bytes", "words")}
        what = "windows of one document" if _is_text(task.part) else "documents"
        said = f"{sums['tokens']:,} targets, each once; {sums['bytes']:,} bytes and {sums['words']:,} words of text; "
        said += f"intervals: over {len(rows):,} {what}"
        below = UNIGRAM in figures and figures["model"]["loss"].value >= figures[UNIGRAM]["loss"].value
        return [said, *(["the model is no better than the frequencies of training tokens alone"] * below)]

    def _windows(self, task: Task) -> tuple[Any, Any]:
        from gpt.evaluation import scoring

        split = task.part.split
        if self.end_of_text_first:
            split = task.cached("split", lambda: with_end_of_text(split, task.tokens.eos))
        context = task.model.config.context_length
        return split, task.cached("windows", lambda: scoring.windows(split, context, task.part.mask, self.stride))

    def _unigram(self, task: Task, split: Any, segments: Any) -> list[float | None]:
        """Nats of each window by how often training data has each token, one added to every count."""
        training = task.part.training
        if training is None or training.data.meta["tokenizer"] != task.tokens.name:
            return [None] * len(segments.start)
        counts = training.counts + 1
        nats = np.log(counts.sum()) - np.log(counts)
        return [float(nats[split.ids[a:b]].sum()) for a, b in zip(segments.scored_from, segments.end, strict=True)]

    def _words(self, task: Task, split: Any, merged: list[dict[str, Any]]) -> list[int]:
        r"""Of each document's text, as lm-eval counts them, `re.split(r"\s+")`; of windows, in proportion to bytes."""
        part = task.part
        if part.questions and part.mask == "response":
            return [len(re.split(r"\s+", question.reference or "")) for question in part.questions]
        ids = [split.ids[start:end] for start, _, end in split.documents]
        texts = [task.tokens.decode(own[own != task.tokens.eos].tolist()) for own in ids]
        counts = [len(re.split(r"\s+", text)) for text in texts]
        if not _is_text(part):
            return counts
        ends = np.cumsum([row["bytes"] for row in merged])
        return np.diff(np.round(ends / max(1, ends[-1]) * counts[0]).astype(int), prepend=0).tolist()


def _is_text(part: Any) -> bool:
    """Whether windows are all there is to count: the text is one document and has no questions."""
    return not part.questions and len(part.split.documents) == 1


def with_end_of_text(split: Any, eos: int) -> Any:
    """A split whose documents begin with the end of a text, so that their first token is scored as well."""
    starts = split.documents[:, 0]
    moved = split.documents + np.arange(len(starts))[:, None]
    documents = np.stack([moved[:, 0], moved[:, 1] + 1, moved[:, 2] + 1], axis=1)
    return type(split)(np.insert(split.ids, starts, eos).astype(split.ids.dtype), documents, split.name)
