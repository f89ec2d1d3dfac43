"""Cleans rows as publishers name and write them into records: instruction, input, output."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt.config.data import DataConfig
from gpt.data import chats
from gpt.data import columns as known
from gpt.data.rows import BadRows, Row
from gpt.errors import UserError
from gpt.terminal.console import escape

ATTRIBUTES = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]  # of HelpSteer, 0 to 4
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")


@dataclass(slots=True)
class Record:
    """One example. `source` and `focus` (what its question is about) steer the split and are not learned from."""

    instruction: str
    input: str
    output: str
    source: str = ""
    focus: str = ""
    split: str | None = None  # the split that the publisher put it into, if any


@dataclass
class Cleaned:
    """Records worth learning from, the count after each step on the way, and the scores of all rows by attribute."""

    records: list[Record] = field(default_factory=list)
    ladder: list[tuple[str, int]] = field(default_factory=list)
    changed_whitespace: int = 0  # answers
    scores: dict[str, list[float]] = field(default_factory=dict)
    n_rows: int = 0  # that could be read
    n_other_chats: int = 0  # chats of several turns, or of another form
    left_out: Counter[str] = field(default_factory=Counter)  # columns not learned from: rows with something in them


def clean(rows: Iterable[Row], cfg: DataConfig, bad: BadRows, result: Cleaned) -> Iterator[Record]:
    """Drops rows with an empty question or answer, then exact duplicates of (instruction, input, output). Gives each
    record as soon as it is read; `result` has all of them and is complete after the last.

    Only question-answer pairs have their whitespace normalised: instructions may contain code. Raises UserError for a
    row that `bad` does not take, and when no row is left.
    """
    unknown = set(cfg.columns) - set(known.COLUMNS[cfg.kind])
    if unknown:
        raise UserError(f"data.columns: {sorted(unknown)[0]} is not one of {', '.join(known.COLUMNS[cfg.kind])}")
    columns: dict[tuple[str, ...], dict[str, str]] = {}  # rows of JSON Lines need not have the same keys
    others: dict[tuple[str, ...], list[str]] = {}
    seen: set[tuple[str, str, str]] = set()
    n_questions = n_answers = 0
    for row in rows:
        try:
            keys = tuple(row.values)
            if keys not in columns:
                columns[keys] = known.find(keys, cfg.kind, cfg.columns)
                used = {*columns[keys].values(), *(ATTRIBUTES if cfg.kind == "helpsteer" else [])}
                others[keys] = [key for key in keys if key not in used]
            cells = _cells(row.values, columns[keys], result)
            scores = _scores(row.values) if cfg.kind == "helpsteer" else {}
        except ValueError as error:
            bad.report(row.where, row.line, str(error), remedy=getattr(error, "remedy", "correct it"))
            continue
        result.n_rows += 1
        result.left_out.update(key for key in others[keys] if row.values[key] not in chats.NOTHING)
        for name, score in scores.items():
            result.scores.setdefault(name, []).append(score)
        if cells is None:
            result.n_other_chats += 1
            continue
        record = _record(cells, cfg.kind, row.split)
        if not record.instruction.strip():
            continue
        n_questions += 1
        if not record.output.strip():
            continue
        n_answers += 1
        result.changed_whitespace += cfg.kind == "qa" and record.output != cells["answer"]
        key = (record.instruction, record.input, record.output)
        if key not in seen:
            seen.add(key)
            result.records.append(record)
            yield record
    n_rows, n_chats = result.n_rows, result.n_rows - result.n_other_chats
    steps = [("rows", n_rows + len(bad.left_out)), ("well-formed", n_rows), ("of one question and answer", n_chats),
             ("with a question", n_questions), ("with an answer", n_answers),
             ("without exact duplicates", len(result.records))]  # fmt: skip
    always = {"rows", "with an answer", "without exact duplicates"}
    result.ladder = [steps[0]] + [
        step for step, before in zip(steps[1:], steps, strict=False) if step[0] in always or step[1] < before[1]
    ]
    if not result.records:
        counts = ", ".join(f"{n:,} {label}" for label, n in result.ladder)
        why = _other_chats(result) if result.n_other_chats else (bad.left_out or [""])[0]
        raise UserError(f"no record is left: {counts}", remedy=why)


def _record(cells: dict[str, str], kind: str, split: str | None) -> Record:
    if kind == "qa":
        question, answer = normalise(cells["question"]), normalise(cells["answer"])
        return Record(question, "", answer, cells.get("source", "").strip(), cells.get("focus_area", ""), split)
    if kind == "helpsteer":
        return Record(cells["prompt"], "", cells["response"], split=split)
    return Record(cells["instruction"], cells.get("input", ""), cells["output"], split=split)


def _cells(values: dict[str, Any], columns: dict[str, str], result: Cleaned) -> dict[str, str] | None:
    """Our name of each column -> its text; None for a chat that is not one question and one answer."""
    if "messages" in columns:
        chat = chats.read(values[columns["messages"]])
        if chat is None:
            return None
        result.left_out.update({f"{columns['messages']}: {key}" for key in chat.others})
        return {"instruction": chat.instruction, "output": chat.output}
    return {name: _text(name, values[column]) for name, column in columns.items()}


def normalise(text: str) -> str:
    r"""Each run of Unicode whitespace (what \s+ matches) as one space, none at the ends."""
    return " ".join(text.split())


def _text(name: str, cell: Any) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise ValueError(f"{name} is {type(cell).__name__} {escape(str(cell)[:40])}, text is needed")
    return cell


def _scores(values: dict[str, Any]) -> dict[str, float]:
    scores = {name: values[name] for name in ATTRIBUTES if values.get(name) not in (None, "")}
    for name, score in scores.items():
        if isinstance(score, str) and NUMBER.fullmatch(score.strip()):  # as in a CSV file
            scores[name] = score = float(score)
        if type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"{name} is {escape(str(score)[:40])}, a number is needed")
    return scores


def describe_left_out(cleaned: Cleaned) -> list[str]:
    """A line each on the columns that are not learned from, and on chats that no template holds."""
    lines = []
    shares = [f"{escape(name[:40])} ({count / cleaned.n_rows:.1%})" for name, count in cleaned.left_out.most_common(12)]
    if shares:
        more = f" and {len(cleaned.left_out) - 12} more" if len(cleaned.left_out) > 12 else ""
        lines.append(f"not learned from, with the share of rows that have it: {', '.join(shares)}{more}")
    if cleaned.n_other_chats:
        lines.append(_other_chats(cleaned))
    return lines


def _other_chats(cleaned: Cleaned) -> str:
    return (
        f"{cleaned.n_other_chats:,} of {cleaned.n_rows:,} rows are left out as a whole: chats of several turns, with "
        "tools or images, or without an answer; the templates hold one question and one answer"
    )


def oddities(cleaned: Cleaned) -> dict[str, int]:
    """Counts that tell how regular the cleaned records are."""
    answers_to: dict[tuple[str, str], set[str]] = {}
    for record in cleaned.records:
        answers_to.setdefault((record.instruction, record.input), set()).add(record.output)
    answers = Counter(record.output for record in cleaned.records)
    return {
        "questions with several answers": sum(len(outputs) > 1 for outputs in answers_to.values()),
        "times the most frequent answer occurs": max(answers.values()),
        "answers under 50 characters": sum(len(record.output) < 50 for record in cleaned.records),
        "answers whose whitespace was normalised": cleaned.changed_whitespace,
        "rows without a focus area": sum(not record.focus.strip() for record in cleaned.records),
    }


def score_statistics(scores: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """attribute -> count, mean, std, min, quartiles, max over all rows, rounded to 4 places."""
    statistics = {}
    for name, values in scores.items():
        low, first, median, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan  # of a sample
        described = {"count": len(values), "mean": np.mean(values), "std": std, "min": low}
        described |= {"25%": first, "50%": median, "75%": third, "max": high}
        statistics[name] = {key: round(float(value), 4) for key, value in described.items()}
    return statistics
