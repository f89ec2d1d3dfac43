"""Makes the tables of a sweep: for the terminal, as CSV, as Markdown, and val/loss over two settings."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gpt.config.schema import METRIC
from gpt.sweeps.jobs import Job, as_text, generate_command, is_number, varied_keys
from gpt.sweeps.leaderboard import Entry, Results, mean_text
from gpt.terminal.console import escape
from gpt.terminal.figures import Grid

# Columns of the closing table that a narrow terminal does without, the first of them first.
LEAST_IMPORTANT = ["seconds", "tokens/s", "val/bpb", "tokens", "folder", "std", "seeds"]


def setting_keys(entries: Sequence[Entry]) -> list[str]:
    """The varied settings, without the seed."""
    return list(entries[0].settings) if entries else []


def score_names(entries: Sequence[Entry]) -> list[str]:
    """The headline figures of evaluations that any entry has."""
    return list(dict.fromkeys(name for entry in entries for name in entry.scores))


def result_columns(entries: Sequence[Entry]) -> list[str]:
    """Of leaderboard.md and report.html."""
    last = ["tokens", "time", "tokens/s", "folder", "status"]
    return [METRIC, "95 % interval", "seeds", "val/bpb", *score_names(entries), *last]


def columns(entries: Sequence[Entry]) -> list[str]:
    """Of the closing table, for console.table."""
    seeds = ["std", "seeds"] if any(len(entry.jobs) > 1 for entry in entries) else []
    last = ["tokens", "tokens/s", "seconds", "folder"]
    return [*setting_keys(entries), "status", METRIC, *seeds, "val/bpb", *score_names(entries), *last]


def rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Of the closing table. Numbers stay numbers, which console.table aligns and never cuts."""
    return [
        {key: value if is_number(value) else as_text(value) for key, value in entry.settings.items()}
        | {
            "status": entry.status,
            METRIC: entry.mean,
            "std": entry.std,
            "seeds": len(entry.counted),
            "val/bpb": entry.bpb,
            **entry.scores,
            "tokens": entry.tokens,
            "tokens/s": entry.tokens_per_second,
            "seconds": round(entry.seconds, 1) if entry.seconds else None,
            "folder": entry.best.id,
        }
        for entry in entries
    ]


def entries_csv(entries: Sequence[Entry]) -> str:
    """leaderboard.csv: a line per entry, numbers with all their digits. Only completed entries have a rank."""
    results = [METRIC, "std", "low", "high", "seeds", "val/bpb", "tokens", "seconds", "tokens_per_second"]
    results += score_names(entries)
    lines = [["rank", *setting_keys(entries), *results, "status", "jobs"]]
    for rank, (entry, row) in enumerate(zip(entries, rows(entries), strict=True), start=1):
        row |= {"low": entry.low, "high": entry.high, "seconds": round(entry.seconds, 3)}
        row |= {"tokens_per_second": entry.tokens_per_second}
        values = [row.get(key) for key in [*entry.settings, *results]]
        ids = " ".join(job.id for job in entry.jobs)
        lines.append([rank if entry.losses else "", *values, entry.status, ids])
    return _csv(lines)


def jobs_csv(jobs: Sequence[Job]) -> str:
    """sweep.csv: a line for each job, what was typed and what came of it, numbers with all their digits."""
    keys = list(dict.fromkeys(key for job in jobs for key in [*job.typed, *varied_keys(jobs)]))
    results = {METRIC: "val_loss", "val/bpb": "val_bpb"}
    results |= {name: name for name in ("tokens", "tokens_per_second", "seconds", "code", "error")}
    lines = [["job", "status", *keys, *results]]
    for job in jobs:
        values = [job.setting(key) for key in keys]
        lines.append([job.id, job.status, *values, *(getattr(job, name) for name in results.values())])
    return _csv(lines)


def results(entry: Entry, scores: Sequence[str]) -> list[str]:
    """What came of an entry, in the `result_columns`; `scores`: the `score_names` of all entries."""
    return [
        mean_text(entry),
        "" if entry.low is None else f"{entry.low:.4f} to {entry.high:.4f}",
        str(len(entry.counted)),
        "" if entry.bpb is None else f"{entry.bpb:.4f}",
        *(f"{entry.scores[name]:.4g}" if name in entry.scores else "" for name in scores),
        f"{entry.tokens:,}",
        f"{entry.seconds:,.0f} s" if entry.seconds else "",
        "" if entry.tokens_per_second is None else f"{entry.tokens_per_second:,.0f}",
        entry.best.id,
        entry.status,
    ]


def markdown(sweep: Results) -> str:
    """leaderboard.md; sections without content are left out."""
    header = ["", *setting_keys(sweep.entries), *result_columns(sweep.entries)]
    scores = score_names(sweep.entries)
    lines = [_line(header), "|" + " --- |" * len(header)]
    for rank, entry in enumerate(sweep.entries, start=1):
        settings = map(as_text, entry.settings.values())
        lines.append(_line([str(rank) if entry.losses else "", *settings, *results(entry, scores)]))
    parts = [f"# {_plain(sweep.title)}", _plain(sweep.verdict), "\n".join(lines)]
    parts.append(
        "val/loss: mean +- standard deviation over the seeds. The interval is that of the mean (Student's t). "
        "tokens: mean; time: sum; folder: of the best job."
    )
    if best := sweep.best:
        parts.append(
            f"The best job is in {_plain(best.id)}. To generate text from it:\n\n    {escape(generate_command(best))}"
        )
    sections = {"Not comparable": sweep.caveats, "Loss and scores": sweep.agreement}
    sections |= {"Predicted best": sweep.predictions, "Failures": sweep.failures}
    for name, sentences in sections.items():
        if sentences:
            parts.append(f"## {name}\n\n" + "\n".join(f"- {_plain(sentence)}" for sentence in sentences))
    return "\n\n".join(parts) + "\n"


def grid(entries: Sequence[Entry]) -> Grid | None:
    """val/loss over the two settings that vary besides the seed; None when there are fewer or more, or no loss."""
    keys = setting_keys(entries)
    evaluated = [entry for entry in entries if entry.mean is not None]
    if len(keys) != 2 or not evaluated:
        return None
    # A page may be long but not wide: the shorter axis is that of the columns.
    axes = sorted(((key, _values(entries, key)) for key in keys), key=lambda axis: -len(axis[1]))
    (row_key, row_values), (column_key, column_values) = axes
    losses = [[math.nan] * len(column_values) for _ in row_values]
    best, unfinished = None, set()
    for entry in evaluated:
        row = row_values.index(as_text(entry.settings[row_key]))
        column = column_values.index(as_text(entry.settings[column_key]))
        losses[row][column] = entry.mean
        if not entry.losses:
            unfinished.add((row, column))
        elif best is None:  # entries come best first
            best = row, column
    return Grid((row_key, column_key), row_values, column_values, losses, best, unfinished)


def _values(entries: Sequence[Entry], key: str) -> list[str]:
    """The values of a setting: numbers first, in order of size, then texts."""
    values = {as_text(entry.settings[key]): entry.settings[key] for entry in entries}

    def place(label: str) -> tuple[bool, float, str]:
        value = values[label]
        return not is_number(value), value if is_number(value) else 0, label

    return sorted(values, key=place)


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")  # which writes nothing for None
    writer.writerows([escape(cell) if isinstance(cell, str) else cell for cell in line] for line in lines)
    return text.getvalue()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """Text on one line in which nothing is markup: no column border, HTML, link, code or emphasis."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", escape(text))
