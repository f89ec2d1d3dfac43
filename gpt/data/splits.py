"""Splits records so that what is tested has not been seen in training, and measures how far that holds."""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from gpt.config.data import DataConfig
from gpt.data.records import Record, normalise
from gpt.errors import UserError

NAMES = ("train", "val", "test")
IN_ORDER = ("train", "test", "val")  # where a split takes what follows each other: the book's order
TOLERANCE = 0.2  # of the rows that a split should have: by how much groups that are kept together may miss it
PUNCTUATION = re.compile(r"[\W_]+")

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
        if _misses(Counter(chosen[i] for i in free), shares, len(free)):
            chosen = _fitted(records, free, shares, chosen, rng)
    else:
        chosen = _in_order(rng.sample(free, len(free)) if cfg.split == "random" else free, shares)
    for i, record in enumerate(records):
        if record.split in given:
            chosen[i] = record.split
    parts = {name: [i for i in range(len(records)) if chosen[i] == name] for name in NAMES}
    if cfg.split == "grouped" and not (parts["train"] and parts["val"]) and len(groups(records)) < len(records):
        counts = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
        raise UserError(
            f"a split is empty: {counts} documents, as {_cause(records)}", "data.val_fraction, data.test_fraction",
            "data.split=random cuts through such groups, else more data or other fractions are needed",
        )  # fmt: skip
    return parts


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


def missed_shares(records: Sequence[Record], parts: Splits, cfg: DataConfig) -> str | None:
    """A line on the splits whose number of rows differs from what was asked for by more than TOLERANCE, because groups
    are kept together; None where there are none."""
    wanted = {"val": cfg.val_fraction, "test": cfg.test_fraction}
    given = {record.split for record in records}
    shares = {name: share for name, share in wanted.items() if name not in given}
    sizes = {name: len(part) for name, part in parts.items()}
    missed = _misses(sizes, shares, len(records)) if cfg.split == "grouped" else {}
    if not missed:
        return None
    told = ", ".join(
        f"{name} has {sizes[name] / len(records):.1%} of the rows, not {shares[name]:.1%}" for name in missed
    )
    return f"{told}: {_cause(records)}; data.split=random cuts through such groups"


def _misses(sizes: Mapping[str, int], shares: Mapping[str, float], n_rows: int) -> dict[str, float]:
    """val or test -> by how many rows, as a share of what is due, its size is not that, where it is more than TOLERANCE
    and a whole row."""
    due = {name: shares[name] * n_rows for name in ("val", "test") if shares.get(name)}
    return {
        name: abs(sizes.get(name, 0) - n) / n
        for name, n in due.items()
        if abs(sizes.get(name, 0) - n) > max(TOLERANCE * n, 1 - 1e-9)
    }


def _cause(records: Sequence[Record]) -> str:
    """Why shares cannot be met by whole groups."""
    sizes = sorted(map(len, groups(records)), reverse=True)
    largest = ", ".join(f"{size:,}" for size in sizes[:3])
    what = "question or a focus area" if any(record.focus for record in records) else "question"
    return (
        f"rows with a {what} in common are kept together, and the largest of {len(sizes):,} groups have {largest} rows"
    )


def _fitted(
    records: Sequence[Record], free: list[int], shares: dict[str, float], chosen: dict[int, str], rng: random.Random
) -> dict[int, str]:
    """The groups in which `chosen` puts the rows of train, val and test, put so that val and test have as many rows as
    are due, whatever the sources; `chosen` itself where that is no nearer."""
    is_free = set(free)
    left = [group for group in groups(records) if is_free.issuperset(group)]
    rng.shuffle(left)
    fitted = dict.fromkeys(chosen, "train") | {i: name for i, name in chosen.items() if i not in is_free}
    for name in ("val", "test"):
        picked = _nearest(list(map(len, left)), shares[name] * len(free))
        for group in (left[i] for i in picked):
            fitted |= dict.fromkeys(group, name)
        left = [group for i, group in enumerate(left) if i not in picked]
    before, after = (
        sum(_misses(Counter(how[i] for i in free), shares, len(free)).values()) for how in (chosen, fitted)
    )
    return fitted if left and after < before else chosen


def _nearest(sizes: list[int], due: float) -> set[int]:
    """The places of sizes whose sum is nearest to what is due, or within a hundredth of it: the first such ones."""
    mask, near = (1 << int(2 * due) + 2) - 1, range(math.ceil(0.99 * due), int(1.01 * due) + 1)
    reached = [1]  # bit n of the i-th number: some of the first i sizes have the sum n
    for size in sizes:
        reached.append((reached[-1] | reached[-1] << size) & mask)
        if any(reached[-1] >> total & 1 for total in near):
            break
    sums = [total for total in range(mask.bit_length()) if reached[-1] >> total & 1]
    total = min(sums, key=lambda total: (abs(total - due), -total))
    picked = set()
    for i in reversed(range(len(reached) - 1)):
        if not reached[i] >> total & 1:
            picked.add(i)
            total -= sizes[i]
    return picked


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


def bare_key(record: Record) -> str:
    """Equal for questions that differ in case, white space or punctuation only."""
    return PUNCTUATION.sub(" ", question_key(record)).strip() or question_key(record)


def leaks(records: Sequence[Record], splits: Splits) -> dict[str, dict[str, float]]:
    """For val and test, unless they are empty: the share of rows whose question occurs in train, also without its
    punctuation where that is more, and, where there are focus areas, the share whose focus does (0..1)."""
    keys = {"question": question_key, "question_bare": bare_key, "focus": focus_key}
    report = {}
    seen = {label: {key(records[i]) for i in splits["train"]} - {""} for label, key in keys.items()}
    has_focus = any(focus_key(record) for record in records)
    for name in ("val", "test"):
        rows = [records[i] for i in splits[name]]
        if not rows:
            continue
        shares = {label: round(sum(key(r) in seen[label] for r in rows) / len(rows), 4) for label, key in keys.items()}
        dropped = {"focus": not has_focus, "question_bare": shares["question_bare"] <= shares["question"]}
        report[name] = {label: share for label, share in shares.items() if not dropped.get(label)}
    return report
