"""Prepared tokens -> batches, for training and for validation.

A document is one record (prompt, response, end of text) or one long text. A segment is what one row may see of it: all
of it, or a piece of at most context_length tokens. A batch is a pure function of (seed, epoch, step): nothing is drawn
from a stream, so nothing has to be saved to go on in the middle of an epoch.
"""

import bisect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt import tokenfiles
from gpt.errors import UserError
from gpt.schema import DataConfig, TrainConfig, TrainSection

IGNORE = -100  # the target that F.cross_entropy skips
PAST_TENSE = {"split": "split", "truncate": "truncated", "drop": "dropped"}


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass."""

    inputs: Tensor  # (B, T) ids
    targets: Tensor  # (B, T) ids, IGNORE where nothing is to be predicted
    positions: Tensor | None  # (B, T) places within documents; None: within rows
    documents: Tensor | None  # (B, T) which document of its row a token belongs to; None: one document a row
    n_tokens: int  # inputs that are not padding
    n_targets: int  # targets that are not IGNORE

    def to(self, device: torch.device) -> "Batch":
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Segments(NamedTuple):
    """Pieces of the token file, as arrays of offsets: inputs start..end-2, targets start+1..end-1."""

    start: np.ndarray
    scored_from: np.ndarray  # targets before this offset are not scored
    end: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of inputs of each segment."""
        return self.end - self.start - 1

    def take(self, which: np.ndarray) -> "Segments":
        return Segments(self.start[which], self.scored_from[which], self.end[which])


class Split:
    """One split of prepared data, memory-mapped: `ids`, all tokens in a row, and `documents`, (n, 3) offsets
    start, response_start, end."""

    def __init__(self, ids: np.ndarray, documents: np.ndarray, name: str) -> None:
        self.ids, self.documents, self.name = ids, documents, name

    @classmethod
    def open(cls, directory: Path, name: str) -> "Split":
        """Raises UserError when the files are not what preparing data writes."""
        return cls(*tokenfiles.read(directory, name), name)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when a token id is outside 0..vocab_size-1."""
        largest = max((int(self.ids[i : i + 2**24].max()) for i in range(0, len(self.ids), 2**24)), default=0)
        if largest >= vocab_size:
            raise UserError(
                f"token id {largest} in split {self.name} is outside the vocabulary of {vocab_size}",
                remedy="prepare the data with the model's tokenizer",
            )


def cut(split: Split, context_length: int, mask: str, overflow: str) -> tuple[Segments, dict[str, int]]:
    """Documents -> segments of at most `context_length` inputs, and a count of what happened to longer ones.

    overflow: "split" makes pieces that follow each other, so that every token is a target once; "truncate" keeps the
    first piece; "drop" keeps none. Segments without a scored target (prompts, when mask is "response") are left out
    and counted. Raises UserError when nothing remains.
    """
    start, response, end = split.documents.T
    pieces = -(-(end - start - 1) // context_length)  # ceil; 0 for a document of one token, which predicts nothing
    long = pieces > 1
    if overflow == "drop":
        pieces = np.where(long, 0, pieces)
    elif overflow == "truncate":
        pieces = np.minimum(pieces, 1)
    document = np.repeat(np.arange(len(start)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of the piece in its document
    first = start[document] + number * context_length
    last = np.minimum(end[document], first + context_length + 1)
    scored_from = np.maximum(first + 1, response[document]) if mask == "response" else first + 1
    scored = scored_from < last
    segments = Segments(first[scored], scored_from[scored], last[scored])
    counts = {
        "documents": len(start),
        "longer": int(long.sum()),
        "segments": len(segments.start),
        "unscored": int((~scored).sum()),
    }
    if not len(segments.start):
        longest = int((end - start).max(initial=0))
        raise UserError(
            f"no segment of split {split.name} has a token to predict: {len(start)} documents, the longest of "
            f"{longest} tokens, at model.context_length {context_length} with data.overflow={overflow}, "
            f"data.mask={mask}",
            remedy="raise model.context_length, or set data.overflow=split",
        )
    return segments, counts


class TrainBatches:
    """The training batches of every step of a run; iterate over nothing, ask for a step."""

    def __init__(self, split: Split, cfg: DataConfig, context_length: int, train: TrainSection, seed: int) -> None:
        if cfg.kind == "text" and len(split.ids) <= context_length:
            raise UserError(
                f"the text has {len(split.ids)} tokens to train on, no more than model.context_length {context_length}",
                remedy="give more text or a shorter context",
            )
        self.ids = split.ids
        self.first_tokens = split.documents[:, 0]  # of each document
        self.segments, self.counts = cut(split, context_length, cfg.mask, cfg.overflow)
        self.batching, self.overflow, self.context_length, self.seed = cfg.batching, cfg.overflow, context_length, seed
        self.tokens_per_step, self.micro_batch = train.tokens_per_step, train.micro_batch
        self._plan_epoch, self._plan = -1, []
        self.steps_per_epoch = len(self.plan(0))

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0)."""
        epoch, step = divmod(step, self.steps_per_epoch)
        rows = self.plan(epoch)[step]
        if self.batching == "packed":
            groups = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
            return [collate(self.ids, self.segments, group, self.context_length) for group in groups]
        lengths = self.segments.lengths
        groups = limit_slots([lengths[row[0]] for row in rows], self.micro_batch * self.context_length)
        return [collate(self.ids, self.segments, [rows[i] for i in group]) for group in groups]

    def documents(self, step: int) -> list[int]:
        """The numbers (from 0) of the documents that step `step` reads from."""
        epoch, step = divmod(step, self.steps_per_epoch)
        starts = self.segments.start[[segment for row in self.plan(epoch)[step] for segment in row]]
        return np.unique(np.searchsorted(self.first_tokens, starts, side="right") - 1).tolist()

    def describe(self) -> str:
        """What training reads, and what became of documents that are longer than the context."""
        text = f"{self.counts['documents']:,} documents as {self.counts['segments']:,} segments of at most "
        text += f"{self.context_length} tokens, {self.steps_per_epoch} {self.batching} steps an epoch"
        if self.counts["longer"]:
            text += f"; {self.counts['longer']:,} documents longer than the context: {PAST_TENSE[self.overflow]}"
        if self.counts["unscored"]:
            text += f"; {self.counts['unscored']:,} segments without a response token left out"
        return text

    def plan(self, epoch: int) -> list[list[list[int]]]:
        """Steps -> rows -> segments of one epoch. Every epoch has the same number of steps, each segment once."""
        if epoch != self._plan_epoch:
            rng = np.random.default_rng([self.seed, epoch])
            if self.batching == "packed":
                self._plan = plan_packed(self.segments.lengths, self.context_length, self.tokens_per_step, rng)
            else:
                by_length = self.batching == "bucketed"
                self._plan = plan_unpacked(self.segments.lengths, by_length, self.tokens_per_step, rng)
            self._plan_epoch = epoch
        return self._plan


def plan_packed(
    lengths: np.ndarray, context_length: int, tokens_per_step: int, rng: np.random.Generator
) -> list[list[list[int]]]:
    """Rows filled with several whole segments each; a step has the number of rows nearest to tokens_per_step."""
    rows = pack(lengths, context_length, rng)
    rows_per_step = max(1, round(tokens_per_step / context_length))
    order = rng.permutation(len(rows))
    return [[rows[i] for i in order[k : k + rows_per_step]] for k in range(0, len(rows), rows_per_step)]


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> list[list[int]]:
    """Best-fit decreasing bin packing: each segment, longest first, goes into the fullest row that has room for it.

    Segments of equal length come in random order, so rows differ from epoch to epoch but their number does not.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # rows that are not full, by the room they have left
    rooms: list[int] = []  # the keys of by_room, ascending
    for segment, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        i = bisect.bisect_left(rooms, length)
        if i == len(rooms):
            row, room = [], capacity
            rows.append(row)
        else:
            room = rooms[i]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[i]
        row.append(segment)
        if room > length:
            if room - length not in by_room:
                bisect.insort(rooms, room - length)
            by_room.setdefault(room - length, []).append(row)
    return rows


def plan_unpacked(
    lengths: np.ndarray, by_length: bool, tokens_per_step: int, rng: np.random.Generator
) -> list[list[list[int]]]:
    """One segment a row: in random order ("padded"), or neighbours in length together ("bucketed").

    The sequence of segments is cut where its running number of tokens passes each multiple of an equal share, so a
    step has about tokens_per_step real tokens and the number of steps does not depend on the order.
    """
    order = rng.permutation(len(lengths))
    if by_length:
        order = order[np.argsort(lengths[order], kind="stable")]
    running = np.cumsum(lengths[order])
    n_steps = int(-(-running[-1] // tokens_per_step))
    k = np.arange(1, n_steps)
    cuts = np.searchsorted(running, k * running[-1] / n_steps)
    cuts = np.maximum.accumulate(np.maximum(cuts, k) - k) + k  # at least one segment for each step ...
    cuts = np.minimum(cuts, len(lengths) - n_steps + k)  # ... also for the last ones
    steps = [[[int(segment)] for segment in step] for step in np.split(order, cuts)]
    if by_length:
        steps = [steps[i] for i in rng.permutation(n_steps)]
    return steps


def limit_slots(lengths: list[int], slots: int) -> list[list[int]]:
    """Groups of neighbouring rows such that rows times longest row, padding included, stays within `slots`."""
    groups: list[list[int]] = []
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if not groups or (len(groups[-1]) + 1) * longest > slots:
            groups.append([])
            longest = length
        groups[-1].append(i)
    return groups


def collate(ids: np.ndarray, segments: Segments, rows: list[list[int]], width: int | None = None) -> Batch:
    """Rows of segments -> Batch of `width` columns (default: the longest row), padded at the end.

    Padding is the id 0, as an input that no token attends to and that predicts nothing.
    """
    lengths = segments.lengths
    width = width or int(max(sum(lengths[s] for s in row) for row in rows))
    inputs = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    documents = np.full((len(rows), width), -1, dtype=np.int64)
    n_tokens = 0
    for b, row in enumerate(rows):
        at = 0
        for number, s in enumerate(row):
            start, scored_from, end = (int(array[s]) for array in segments)
            tokens = ids[start:end].astype(np.int64)
            here = slice(at, at + len(tokens) - 1)
            inputs[b, here] = tokens[:-1]
            targets[b, here] = tokens[1:]
            targets[b, at : at + scored_from - start - 1] = IGNORE
            positions[b, here] = np.arange(len(tokens) - 1)
            documents[b, here] = number
            at = here.stop
        n_tokens += at
    several = any(len(row) > 1 for row in rows)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(positions) if several else None,
        torch.from_numpy(documents) if several else None,
        n_tokens,
        int((targets != IGNORE).sum()),
    )


def eval_segments(split: Split, context_length: int, mask: str, max_targets: int) -> Segments:
    """The first `max_targets` scored tokens of a split, each in exactly one segment, whatever the context length.

    A document longer than the context is read in overlapping windows: each scores what the one before did not reach,
    and a token has at least half a context before it, if its document has so much. So losses at different context
    lengths are means over the same tokens.
    """
    stride = max(1, context_length // 2)
    windows: list[tuple[int, int, int]] = []
    left = max_targets
    for start, response, end in split.documents.tolist():
        target = max(start + 1, response) if mask == "response" else start + 1
        end = min(end, target + left)
        left -= max(0, end - target)
        while target < end:
            last = min(end - 1, max(target - 1 + stride, start + context_length))  # the last target of this window
            windows.append((max(start, last - context_length), target, last + 1))
            target = last + 1
        if left <= 0:
            break
    if not windows:
        raise UserError(
            f"split {split.name} has no token to score: {len(split.documents)} documents",
            remedy="prepare more data, or raise data.val_fraction",
        )
    return Segments(*np.array(windows, dtype=np.int64).T)


def eval_batches(split: Split, cfg: DataConfig, context_length: int, train: TrainSection) -> list[Batch]:
    """Batches for `evaluate`, see `eval_segments`; rows of like length together, to save padding."""
    segments = eval_segments(split, context_length, cfg.mask, train.eval_tokens)
    segments = segments.take(np.argsort(-segments.lengths, kind="stable"))
    groups = limit_slots(segments.lengths.tolist(), train.micro_batch * context_length)
    return [collate(split.ids, segments, [[i] for i in group]) for group in groups]


def open_batches(prepared: Path, cfg: TrainConfig, vocab_size: int) -> tuple[TrainBatches, list[Batch]]:
    """The batches that a run trains on and those that it is scored on, from a directory of prepared data.

    Raises UserError for data that does not suit the model.
    """
    train, val = (Split.open(prepared, name) for name in ("train", "val"))
    for split in (train, val):
        split.check_vocabulary(vocab_size)
    context_length = cfg.model.context_length
    batches = TrainBatches(train, cfg.data, context_length, cfg.train, cfg.seed)
    return batches, eval_batches(val, cfg.data, context_length, cfg.train)
