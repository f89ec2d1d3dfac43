"""Splits records so that what is tested has not been seen in training, and measures how far that holds."""

import random
from collections.abc import Sequence

from gpt.config.data import DataConfig
from gpt.data.records import Record, normalise

NAMES = ("train", "val", "test")
IN_ORDER = ("train", "test", "val")  # where a split takes what follows each other: the book's order

Splits = dict[str, list[int]]  # name -> indices of records, in the records' order


def split(records: Sequence[Record], cfg: DataConfig) -> Splits:
    """Assigns every record. What the publisher put into val or test stays there; train is not cut for these again."""
    given = {name for name in ("val", "test") if any(r.split == name for r in records)}
    free = [i for i, r in enumerate(records) if r.split not in given]
    shares = {"val": cfg.val_fraction, "test": cfg.test_fraction}
    shares = {name: 0.0 if name in given else share for name, share in shares.items()}
    shares = {"train": 1 - sum(shares.values()), **shares}
    rng = random.Random(cfg.split_seed)
    if cfg.split == "grouped":
        chosen = _grouped(records, free, shares, rng)
    else:
        chosen = _in_order(rng.sample(free, len(free)) if cfg.split == "random" else free, shares)
    for i, record in enumerate(records):
        if record.split in given:
            chosen[i] = record.split
    return {name: [i for i in range(len(records)) if chosen[i] == name] for name in NAMES}


def _grouped(
    records: Sequence[Record], free: list[int], shares: dict[str, float], rng: random.Random
) -> dict[int, str]:
    """Groups of records with a question or a focus in common stay together; every source is cut in the same shares.

    Each group, in random order, goes where most rows are still due; what is due carries over to the next source.
    A group that the publisher's val or test has a part of goes there as a whole.
    """
    chosen: dict[int, str] = {}
    by_source: dict[str, list[list[int]]] = {}
    is_free = set(free)
    for group in groups(records):
        taken = next((records[i].split for i in group if i not in is_free), None)
        if taken:
            chosen |= dict.fromkeys(group, taken)
        else:
            by_source.setdefault(records[group[0]].source, []).append(group)
    due = dict.fromkeys(shares, 0.0)
    for source in sorted(by_source):
        n_rows = sum(map(len, by_source[source]))
        due = {name: due[name] + share * n_rows for name, share in shares.items()}
        rng.shuffle(by_source[source])
        for group in by_source[source]:
            name = max(due, key=lambda n: due[n])
            due[name] -= len(group)
            chosen |= dict.fromkeys(group, name)
    return chosen


def _in_order(free: list[int], shares: dict[str, float]) -> dict[int, str]:
    """In the order of IN_ORDER."""
    n_val, n_test = (round(shares[name] * len(free)) for name in ("val", "test"))
    n_rows = {"train": len(free) - n_val - n_test, "val": n_val, "test": n_test}
    names = [name for name in IN_ORDER for _ in range(n_rows[name])]
    return dict(zip(free, names, strict=True))


def text_ranges(n_chars: int, cfg: DataConfig) -> list[tuple[str, int, int]]:
    """The characters of running text that each split has: its name, the first one, and where the next split begins."""
    held_out = [cfg.val_fraction + cfg.test_fraction, cfg.val_fraction]  # what begins at each border, test or val
    borders = [0, *(int(n_chars * (1 - share)) for share in held_out), n_chars]
    return list(zip(IN_ORDER, borders, borders[1:], strict=False))


def question_key(record: Record) -> str:
    """Equal for questions that differ in case or whitespace only."""
    return normalise(f"{record.instruction} \x00 {record.input}".casefold())


def focus_key(record: Record) -> str:
    """Equal for focus areas that differ in case or whitespace only; empty when there is none."""
    return normalise(record.focus.casefold())


def groups(records: Sequence[Record]) -> list[list[int]]:
    """Sets of records connected by an equal question or focus, directly or through others (union-find)."""
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, record in enumerate(records):
        for key in (("question", question_key(record)), ("focus", focus_key(record))):
            if key[1]:
                parent[root(i)] = root(first.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(records)):
        members.setdefault(root(i), []).append(i)
    return list(members.values())


def leaks(records: Sequence[Record], splits: Splits) -> dict[str, dict[str, float]]:
    """For val and test: the share of rows whose question occurs in train, and whose focus does (0..1)."""
    seen_questions = {question_key(records[i]) for i in splits["train"]}
    seen_focuses = {focus_key(records[i]) for i in splits["train"]} - {""}
    report = {}
    for name in ("val", "test"):
        rows = [records[i] for i in splits[name]]
        report[name] = {
            "question": round(sum(question_key(r) in seen_questions for r in rows) / max(1, len(rows)), 4),
            "focus": round(sum(focus_key(r) in seen_focuses for r in rows) / max(1, len(rows)), 4),
        }
    return report
