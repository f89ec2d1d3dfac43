"""Makes batches of prepared tokens, for training and for validation.

A document is one record (prompt, response, end of text) or one long text. A segment is what one row may see of it: all
of it, or a piece of at most context_length tokens. A batch is a pure function of (seed, epoch, step): nothing is drawn
from a stream, so nothing has to be saved to go on in the middle of an epoch.
"""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt.config.data import DataConfig
from gpt.config.schema import TrainConfig, TrainSection
from gpt.data import token_files
from gpt.data.packing import Plan, WindowPlan, limit_slots, plan_packed, plan_unpacked
from gpt.data.prepared import Prepared
from gpt.errors import UserError
from gpt.progress import budget
from gpt.terminal.console import count

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
    scored: Tensor | None = None  # (n_targets,) their places, all rows after each other; found when not given
    target_bytes: Tensor | None = None  # (n_targets,) bytes of text of each; 0: none, as the end of a text

    def __post_init__(self) -> None:
        if self.scored is None:  # not later: on a GPU, looking for them would have to wait for it
            object.__setattr__(self, "scored", (self.targets.flatten() != IGNORE).nonzero()[:, 0])

    def to(self, device: torch.device) -> "Batch":
        """On another device. From `pinned` memory a copy to a GPU goes on while Python does."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, which a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, **{k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)})


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
        return cls(*token_files.read(directory, name), name)

    def release(self) -> None:
        """Lets go of mapped pages: they stay in the kernel's cache, but no longer count as memory of this process."""
        if isinstance(self.ids.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.ids.base.madvise(mmap.MADV_DONTNEED)


class Cut:
    """The segments of at most `context_length` inputs that the documents of a split are cut into, numbered from 0. They
    are computed when asked for, never stored, so that a text takes no more memory than its one row in the index.

    overflow: "split" makes pieces that follow each other, so that every token is a target once; "truncate" keeps the
    first piece; "drop" keeps none of a longer document. Segments without a scored target (prompts, when mask is
    "response") are left out. `counts` tells of how many. Raises UserError when no segment remains.
    """

    def __init__(self, split: Split, context_length: int, mask: str, overflow: str) -> None:
        self.documents, self.context_length, self.mask = split.documents, context_length, mask
        start, response, end = self.documents.T
        pieces = -(-(end - start - 1) // context_length)  # ceil; 0 for a document of one token, which predicts nothing
        n_longer = int((pieces > 1).sum())
        if overflow == "drop":
            pieces[pieces > 1] = 0
        elif overflow == "truncate":
            pieces = np.minimum(pieces, 1)
        self.skipped = np.zeros_like(pieces)
        if mask == "response":  # pieces that end before the response does begin predict nothing that is scored
            skipped = np.where(response < end, np.maximum(0, response - start - 1) // context_length, pieces)
            self.skipped = np.minimum(skipped, pieces)
        self.ends = np.cumsum(pieces - self.skipped)  # number of segments of each document and all before it
        self.counts = {"documents": len(start), "longer": n_longer, "segments": len(self)}
        self.counts["unscored"] = int(self.skipped.sum())
        if not len(self):
            raise UserError(
                f"no segment of split {split.name} has a token to predict: {len(start)} documents, the longest of "
                f"{int((end - start).max(initial=0))} tokens, at model.context_length {context_length} with "
                f"data.overflow={overflow}, data.mask={mask}",
                remedy="raise model.context_length, or set data.overflow=split",
            )

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def lengths(self) -> np.ndarray:
        """Number of inputs of each segment: one number for each, so not for a text of any length."""
        return self.take(np.arange(len(self))).lengths

    def document(self, which: np.ndarray) -> np.ndarray:
        """The numbers of the documents that some segments are of."""
        return np.searchsorted(self.ends, which, side="right")

    def take(self, which: np.ndarray) -> Segments:
        document = self.document(which)
        before = np.where(document > 0, self.ends[document - 1], 0)
        start, response, end = self.documents[document].T
        first = start + (which - before + self.skipped[document]) * self.context_length
        scored_from = np.maximum(first + 1, response) if self.mask == "response" else first + 1
        return Segments(first, scored_from, np.minimum(end, first + self.context_length + 1))


class TrainBatches:
    """The training batches of every step of a run; iterate over nothing, ask for a step. `share` returns the part of a
    step's rows that this process computes, where several do: maybe none."""

    def __init__(
        self, split: Split, cfg: DataConfig, context_length: int, train: TrainSection, seed: int,
        share: Callable[[list], list] = list,
    ) -> None:  # fmt: skip
        if cfg.kind == "text" and len(split.ids) <= context_length:
            raise UserError(
                f"the text has {len(split.ids)} tokens to train on, no more than model.context_length {context_length}",
                remedy="give more text or a shorter context",
            )
        self.split, self.seed, self.context_length, self.share = split, seed, context_length, share
        self.segments = Cut(split, context_length, cfg.mask, cfg.overflow)
        self.is_text, self.overflow = cfg.kind == "text", cfg.overflow
        self.batching = "packed" if self.is_text else cfg.batching  # windows of text fill their rows in any case
        self.tokens_per_step, self.micro_batch = train.tokens_per_step, train.micro_batch
        self.rows_per_step = train.rows_per_step(context_length)
        self._planned = 0, (plan := self._plan(0))
        self.steps_per_epoch, self.rows_in_step = len(plan), plan.rows_in_step  # the latter: of most steps
        slots = self.rows_per_step * context_length  # of which packed rows fill about 99 %, others less
        self.tokens_in_step = slots if self.is_text else float(self.segments.lengths.sum()) / self.steps_per_epoch

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0), of this process's share of its rows."""
        rows = self.share(self._rows(step))
        if not rows:
            return []
        width = self.context_length if self.batching == "packed" else None
        if width:
            groups = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
        else:
            lengths = self.segments.take(np.concatenate(rows)).lengths.tolist()
            slots = self.micro_batch * self.context_length
            groups = [[rows[i] for i in group] for group in limit_slots(lengths, slots)]
        batches = [collate(self.split.ids, self.segments, group, width) for group in groups]
        self.split.release()
        return batches

    def documents(self, step: int) -> list[int]:
        """The numbers (from 0) of the documents that step `step` reads from."""
        return np.unique(self.segments.document(np.concatenate(self._rows(step)))).tolist()

    def describe(self) -> str:
        """What training reads, and what became of documents that are longer than the context."""
        counts = self.segments.counts
        text = f"{count(counts['documents'], 'document')} as {count(counts['segments'], 'segment')} of at most "
        steps = count(self.steps_per_epoch, f"{self.batching} step")
        text += f"{count(self.context_length, 'token')}, {steps} an epoch"
        if counts["longer"]:
            text += f"; {count(counts['longer'], 'document')} longer than the context: {PAST_TENSE[self.overflow]}"
        if counts["unscored"]:
            text += f"; {count(counts['unscored'], 'segment')} without a response token left out"
        return text

    def _rows(self, step: int) -> list[np.ndarray]:
        """The segments of each row of a step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        planned, plan = self._planned  # both at once, as another thread may be about to replace them
        if planned != epoch:
            plan = self._plan(epoch)
            self._planned = epoch, plan
        return plan.step(step)

    def _plan(self, epoch: int) -> Plan | WindowPlan:
        """Every epoch has the same number of steps, and each segment once."""
        if self.is_text:
            return WindowPlan(len(self.segments), self.rows_per_step, key=(self.seed, epoch))
        lengths = self.segments.lengths
        rng = np.random.default_rng([self.seed, epoch])
        if self.batching == "packed":
            return plan_packed(lengths, self.context_length, self.rows_per_step, rng)
        return plan_unpacked(lengths, self.batching == "bucketed", self.tokens_per_step, rng)


Rows = Sequence[Sequence[int] | np.ndarray]  # the numbers of the segments in each row


def collate(ids: np.ndarray, segments: Cut | Segments, rows: Rows, width: int | None = None) -> Batch:
    """Rows of segments -> Batch of `width` columns (default: the longest row), padded at the end.

    Padding is the id 0, as an input that no token attends to and that predicts nothing.
    """
    counts = np.array([len(row) for row in rows])
    start, scored_from, end = segments.take(np.concatenate(rows))
    n = end - start - 1  # inputs of each segment
    before = np.cumsum(n) - n  # inputs of all segments ahead of it ...
    first_in_row = np.cumsum(counts) - counts
    column = before - np.repeat(before[first_in_row], counts)  # ... in its row
    number = np.arange(len(n)) - np.repeat(first_in_row, counts)  # of the segment in its row
    width = width or int((column + n).max())

    position = np.arange(n.sum()) - np.repeat(before, n)  # from here on one entry for each input, not for each segment
    source = np.repeat(start, n) + position
    place = np.repeat(np.repeat(np.arange(len(rows)), counts) * width + column, n) + position
    is_scored = source + 1 >= np.repeat(scored_from, n)

    def filled(padding: int, values: np.ndarray) -> Tensor:
        array = np.full(len(rows) * width, padding, dtype=np.int64)
        array[place] = values
        return torch.from_numpy(array).view(len(rows), width)

    several = bool((counts > 1).any())
    return Batch(
        inputs=filled(0, ids[source]),
        targets=filled(IGNORE, np.where(is_scored, ids[source + 1].astype(np.int64), IGNORE)),
        positions=filled(0, position) if several else None,
        documents=filled(-1, np.repeat(number, n)) if several else None,
        n_tokens=len(source),
        n_targets=int(is_scored.sum()),
    )


def eval_segments(
    split: Split, context_length: int, mask: str, max_targets: int, stride: int | None = None
) -> Segments:
    """The first `max_targets` scored tokens of a split, each in exactly one segment, whatever the context length.

    A document longer than the context is read in overlapping windows: each scores the up to `stride` targets (default:
    half a context) that the one before did not reach, the first one a whole context of them. So a token has at least
    context_length - stride tokens before it, if its document has so many, and losses at different context lengths are
    means over the same tokens.
    """
    stride = stride or max(1, context_length // 2)
    windows: list[tuple[int, int, int]] = []
    left = max_targets
    for start, response, end in map(np.ndarray.tolist, split.documents):  # no more of them than needed
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


def eval_batches(
    split: Split, cfg: DataConfig, context_length: int, train: TrainSection, bytes_per_token: np.ndarray | None = None
) -> list[Batch]:
    """Batches for `evaluate`, see `eval_segments`; rows of like length together, to save padding.

    bytes_per_token: (V,) the length of each token in bytes of text; without it no batch has `target_bytes`.
    """
    segments = eval_segments(split, context_length, cfg.mask, train.eval_tokens)
    segments = segments.take(np.argsort(-segments.lengths, kind="stable"))
    groups = limit_slots(segments.lengths.tolist(), train.micro_batch * context_length)
    batches = [collate(split.ids, segments, [[i] for i in group]) for group in groups]
    if bytes_per_token is None:
        return batches
    lengths = torch.from_numpy(bytes_per_token)
    return [replace(batch, target_bytes=lengths[batch.targets.flatten()[batch.scored]]) for batch in batches]


@dataclass(frozen=True)
class Batches:
    """What a run trains on and is scored on, and how long it is."""

    train: TrainBatches
    validation: list[Batch]
    data: Prepared  # as it was opened
    total_steps: int
    budget: str  # the key that decides total_steps

    def describe(self) -> str:
        """500 steps (train.max_tokens)"""
        return f"{count(self.total_steps, 'step')} ({self.budget})"


def open_batches(
    data: Prepared, cfg: TrainConfig, vocab_size: int, bytes_per_token: np.ndarray | None = None,
    share: Callable[[list], list] = list,
) -> Batches:  # fmt: skip
    """The batches of a run; `share` as in TrainBatches. Raises UserError for prepared data that does not suit it."""
    train, val = (Split.open(data.folder, name) for name in ("train", "val"))
    for split in (train, val):
        if (largest := token_files.largest_id(data.folder, split.name)) >= vocab_size:
            raise UserError(
                f"token id {largest} in split {split.name} is outside the vocabulary of {vocab_size}",
                remedy="prepare the data with the model's tokenizer",
            )
    context_length = cfg.model.context_length
    batches = TrainBatches(train, cfg.data, context_length, cfg.train, cfg.seed, share)
    validation = eval_batches(val, cfg.data, context_length, cfg.train, bytes_per_token)
    return Batches(batches, validation, data, *count_steps(cfg.train, batches))


def count_steps(cfg: TrainSection, batches: TrainBatches) -> tuple[int, str]:
    """The length of a run in optimizer steps, and the key that decides it. Padding counts in no budget of tokens, so
    that runs have equal ones whatever their context length leaves of a row."""
    epoch_steps = None if cfg.max_epochs is None else cfg.max_epochs * batches.steps_per_epoch
    steps_and_key = budget(cfg.max_steps, epoch_steps, cfg.max_tokens, batches.tokens_in_step)
    if steps_and_key is None:
        raise UserError("a run needs a budget", remedy="set train.max_steps, train.max_epochs or train.max_tokens")
    return steps_and_key
