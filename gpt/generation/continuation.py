"""Continues many prompts at once: a step computes one more token of every row of a batch.

A prompt is read alone, as gpt/sampling.py's `generate` reads it, and its keys and values then stand in a slot of the
batch. A row that has ended makes room for the next prompt at once, so rows wait for no longer one, and none is padded.

Same seed, same text: what a row becomes depends on the model, its prompt, the settings, its random numbers and the
number of slots, and not on the other rows, on which of them came before it, or on its slot. For that every step
computes all slots, also those that are empty, and their number is a multiple of SLOTS, as the last rows of a product of
matrices are rounded in another way than the others where there are fewer. Against `generate`, and against another
number of slots, products may round otherwise (by 3e-6 of a logit), so that now and then a token differs.

Letters in shape comments are those of gpt/model.py: R rows, T tokens, C width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gpt import sampling
from gpt.errors import UserError
from gpt.generation.row_cache import RowCache
from gpt.model import LanguageModel
from gpt.sampling import Draws

SLOTS = 8  # a multiple of four is enough for MKL's kernels of AVX2 and AVX-512


class Continuation(NamedTuple):
    """What a model has written after a prompt, without the end of text, and whether it came to that."""

    ids: list[int]
    stopped: bool


@dataclass
class Row:
    """A prompt of at most a context's length, how many tokens may follow it, its random numbers, and what it became."""

    prompt: Sequence[int]
    max_new_tokens: int
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    stopped: bool = False
    over: bool = False

    def append(self, token: int, draws: Draws, ends: Callable[[list[int]], bool]) -> None:
        self.stopped = token == draws.eos
        if not self.stopped:
            self.new.append(token)
        self.over = self.stopped or len(self.new) == self.max_new_tokens or ends(self.new)


def continue_each(
    model: LanguageModel,
    rows: Iterable[Row],
    n_slots: int,
    draws: Draws,
    *,
    n_columns: int,
    ends: Callable[[list[int]], bool] = lambda ids: False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
    """Yields each row as soon as it is over, which need not be in order; `n_slots` of them are computed at once.

    n_columns: the most tokens that a row has, with its prompt, within the context. `ends`: whether a row is over after
    these new ids, too. `stop` is called before each step; once it returns true, there are no more rows. A row that
    fills the context goes on as `generate` does, with the last tokens alone, computed apart from the others.
    """
    batch = _Batch(model, iter(rows), n_slots, draws, n_columns, ends)
    while not stop():
        with sampling.eval_mode(model), torch.inference_mode():  # not while the caller has the row
            over = batch.step()
        yield from over
        if not over and batch.is_empty:
            return


class _Batch:
    """The rows that are computed now, each in a slot."""

    def __init__(
        self, model: LanguageModel, waiting: Iterator[Row], n_slots: int, draws: Draws, n_columns: int,
        ends: Callable[[list[int]], bool],
    ) -> None:  # fmt: skip
        self.model, self.waiting, self.draws, self.ends = model, waiting, draws, ends
        self.context_length = model.config.context_length
        self.n_slots = -(-n_slots // SLOTS) * SLOTS
        self.free = list(reversed(range(n_slots)))  # slots beyond n_slots stay empty
        self.live: dict[int, Row] = {}  # slot -> row
        self.cache = RowCache(self.n_slots, min(n_columns, self.context_length))
        self.read: tuple[Sequence[int], sampling.KVCache, Tensor] | None = None  # the last prompt, and what it gave

    @property
    def is_empty(self) -> bool:
        return not self.live

    def step(self) -> list[Row]:
        """Reads the next prompt if there is a free slot, else computes one token of each row; returns those that are
        over."""
        if self.free and (row := next(self.waiting, None)) is not None:
            return self.admit(row)
        if not self.live:
            return []
        slots = sorted(self.live)
        rows = [self.live[slot] for slot in slots]
        logits = self.logits()[slots]  # (R, V)
        for i, row in enumerate(rows):
            if len(row.prompt) + len(row.new) > self.context_length:
                logits[i] = sampling.next_logits(self.model, [*row.prompt, *row.new], None)
        tokens = draw_each(logits, self.draws, [row.generator for row in rows])
        over = []
        for slot, row, token in zip(slots, rows, tokens, strict=True):
            row.append(token, self.draws, self.ends)
            if row.over:
                over.append(row)
                self.free.append(slot)
                del self.live[slot]
        return over

    def admit(self, row: Row) -> list[Row]:
        """Reads a prompt, or takes what the same one has given before, and draws its first token."""
        if self.read is None or self.read[0] != row.prompt:
            cache = sampling.KVCache(self.context_length)
            self.read = row.prompt, cache, sampling.next_logits(self.model, list(row.prompt), cache)
        _, cache, logits = self.read
        [token] = draw_each(logits[None], self.draws, [row.generator])
        row.append(token, self.draws, self.ends)
        if row.over:
            return [row]
        slot = self.free.pop()
        self.cache.fill(slot, cache)
        self.live[slot] = row
        return []

    def logits(self) -> Tensor:
        """(R, V) logits of the next token in every slot; those of empty ones mean nothing."""
        tokens, positions = torch.zeros(2, self.n_slots, dtype=torch.long)
        for slot, row in self.live.items():
            position = len(row.prompt) + len(row.new) - 1
            if position < self.context_length:
                tokens[slot], positions[slot] = row.new[-1], position
        device = self.model.head.device
        tokens, positions = tokens.to(device), positions.to(device)
        mask = self.cache.move_to(positions)
        return sampling.checked(self.model(tokens[:, None], positions[:, None], mask, self.cache, where=-1))


def continue_all(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    draws: Draws,
    generators: Sequence[torch.Generator],
) -> list[Continuation]:
    """Continues each prompt once, all together. A row ends as `draws` say, or where its context is full, whatever the
    other rows do.

    `generators`: the random numbers of each row; not used at temperature 0. Raises UserError for an empty prompt, and
    ValueError for one that leaves no room in the context.
    """
    if not all(map(len, prompts)):
        raise UserError("the prompt is empty", remedy="give at least one token to go on from")
    longest = max(map(len, prompts))
    if longest >= model.config.context_length:
        raise ValueError(f"a prompt of {longest} tokens fills the context")
    room = model.config.context_length
    rows = [
        Row(prompt, min(draws.max_new_tokens, room - len(prompt)), generator)
        for prompt, generator in zip(prompts, generators, strict=True)
    ]
    for _ in continue_each(model, rows, len(rows), draws, n_columns=longest + draws.max_new_tokens):
        pass
    return [Continuation(row.new, row.stopped) for row in rows]


def draw_each(logits: Tensor, draws: Draws, generators: Sequence[torch.Generator]) -> list[int]:
    """A token for each row of (R, V) logits, the same that sampling.draw gives of that row's probabilities."""
    if draws.temperature == 0:
        return logits.argmax(-1).tolist()
    ids = None
    if draws.top_k is not None and draws.top_p is None and draws.top_k < logits.shape[-1]:
        likeliest = logits.topk(draws.top_k + 1)  # (R, k + 1), one more, to see whether others equal the k-th
        if (likeliest.values[:, -1] < likeliest.values[:, -2]).all():
            ids = likeliest.indices[:, :-1].sort(-1).values  # (R, k) in the order of the vocabulary
            logits = logits.gather(-1, ids)
    chances = draws.probabilities(logits)
    cumulative = chances.cumsum(-1)  # (R, V) or (R, k)
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])[:, None]
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (R, 1)
    return (place if ids is None else ids.gather(-1, place))[:, 0].tolist()
