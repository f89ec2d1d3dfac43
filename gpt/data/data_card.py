"""Describes prepared data for people: the data card, and the summary in the terminal."""

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpt.files.paths import shareable
from gpt.terminal.console import count

LEAKS = {
    "question": "question occurs in train",
    "question_bare": "without punctuation",
    "focus": "focus occurs in train",
}


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Mean, median, p95, p99 and maximum, rounded to whole tokens."""
    values = np.asarray(lengths)
    cuts = {"median": 50, "p95": 95, "p99": 99}
    return {
        "mean": round(float(values.mean())),
        **{name: round(float(np.percentile(values, cut))) for name, cut in cuts.items()},
        "max": int(values.max()),
    }


def summary(meta: dict[str, Any]) -> str:
    """Ladder, splits and leaks of prepared data, as lines for a terminal."""
    lines = [f"{count:>12,}  {label}" for label, count in meta["ladder"]]
    for name, split in meta["splits"].items():
        lines.append(f"{name:>12}  {count(split['documents'], 'document')}, {count(split['tokens'], 'token')}")
    lines += [f"{name:>12}  {describe_leak(leak)}" for name, leak in meta.get("leaks", {}).items()]
    return "\n".join(lines)


def data_card(meta: dict[str, Any]) -> str:
    """README.md of a prepared directory. Says nothing that differs between two preparations of the same data."""
    settings, card = meta["settings"], meta["settings"]["card"]
    parts = [
        f"# {card['title']}",
        card["description"].strip(),
        f"- Licence: {card['license']}\n- Citation: {card['citation']}\n- Source: {_source(meta['source'])}",
        "## From the source to what is learned",
        _table(["step", "left"], [[label, f"{count:,}"] for label, count in meta["ladder"]]),
        "## Splits",
        _table(
            ["split", "documents", "tokens", "of these in responses"],
            [[name, *(f"{split[k]:,}" for k in ("documents", "tokens", "response_tokens"))]
             for name, split in meta["splits"].items()],
        ),
        _how_split(meta),
        f"Tokenizer {meta['tokenizer']} ({meta['n_vocab']:,} tokens); token files `{meta['fingerprint'][:12]}/`.",
    ]  # fmt: skip
    if meta["kind"] != "text":
        parts += _about_records(meta)
    if meta.get("scores"):
        parts += ["## Scores of all rows", _scores(meta["scores"])]
    parts += ["## Made with", f"`{_command(meta)}`, seed {settings['split_seed']}."]
    return "\n\n".join(parts) + "\n"


def _command(meta: dict[str, Any]) -> str:
    """What to type at the project's directory; older versions did not record the path."""
    path = meta["source"].get("path")
    return shlex.join(
        ["python", "prepare_data.py", f"data={meta['name']}", *([f"data.path={shareable(path)}"] if path else [])]
    )


def _about_records(meta: dict[str, Any]) -> list[str]:
    lengths = meta["lengths"]
    columns = list(lengths["document"])
    columns_of_leaks = {
        key: label for key, label in LEAKS.items() if any(key in leak for leak in meta["leaks"].values())
    }
    counted = [f"- {label}: {count:,}" for label, count in meta["oddities"].items() if count]
    return [
        "## Leaks",
        "How much of what is held out can be known from train:",
        _table(
            ["split", *columns_of_leaks.values()],
            [
                [name, *(f"{leak.get(key, leak['question']):.1%}" for key in columns_of_leaks)]
                for name, leak in meta["leaks"].items()
            ],
        ),
        "## Lengths in tokens",
        _table(["", *columns], [[name, *(f"{row[c]:,}" for c in columns)] for name, row in lengths.items()]),
        f"A document is the prompt (template `{meta['template']}`), the response and the end of text. Counted before "
        f"the length filter: {meta['tokens_before_length_filter']:,} tokens. Documents above the limit are left out of "
        f"the splits, not of `{meta['name']}_alpaca.jsonl`.",
        "![How long the documents are](token_lengths.png)",
        "## Oddities",
        "\n".join(counted) or "None.",
    ]


def _how_split(meta: dict[str, Any]) -> str:
    settings = meta["settings"]
    shares = f"val {settings['val_fraction']:.0%}, test {settings['test_fraction']:.0%}"
    if meta["kind"] == "text":
        return f"The text is cut by characters, {shares}: train first, then test, then val."
    how = {
        "grouped": "Rows with the same focus area or the same question are kept together; every source is split alike.",
        "random": "Rows are split at random, whatever they have in common.",
        "sequential": "Rows are split in the order of the source: train first, then test, then val.",
    }[settings["split"]]
    given = meta.get("publisher_splits")
    if given:
        how += f" The publisher's own rows for {' and '.join(given)} are used as such, other shares are of the rest."
        if settings["split"] == "grouped":
            how += " Rows of train that have a question in common with these joined them."
    return f"{how} Shares: {shares}."


def _source(source: dict[str, Any]) -> str:
    if "hub" in source:
        return f"{source['hub']} on the Hugging Face hub, revision {source['revision'] or 'unknown'}"
    files = source["files"]
    shown = ", ".join(f"`{f['file']}` ({f['bytes']:,} bytes, sha256 {f['sha256'][:12]}...)" for f in files[:5])
    return shown + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def _scores(scores: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(scores.values())))
    return _table(["", *columns], [[name, *(f"{row[c]:,.4g}" for c in columns)] for name, row in scores.items()])


def describe_leak(leak: dict[str, float]) -> str:
    """How much of a split can be known from train."""
    bare = f" ({leak['question_bare']:.1%} without punctuation)" if "question_bare" in leak else ""
    focus = f", {leak['focus']:.1%} share their focus with train" if "focus" in leak else ""
    return f"{leak['question']:.1%} of the questions occur in train{bare}{focus}"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ruler, *rows])
