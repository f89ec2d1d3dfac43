"""Estimates the memory of a step, and chooses how many rows at a time fit.

Bytes are plain counts, 1 GB = 10^9. How far the estimates are from what is measured: tests/machine/test_memory.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt.config.schema import TrainConfig
from gpt.machine import free_memory, rank_environment
from gpt.machine.ranks import ALONE, Ranks
from gpt.terminal import console

if TYPE_CHECKING:  # torch takes seconds, and a script reads this file before it knows what to do
    import torch

FREE_SHARE = 0.8  # of the free memory that a micro-batch may be chosen to fill
# Measured on a CPU; those of other devices are guesses.
BASE = {"cpu": 310_000_000, "mps": 310_000_000, "cuda": 300_000_000}  # Python, torch, wandb; on a GPU its workspaces
GAPS = 1.25  # bytes that an allocator holds for each byte in use, as it cannot fill every gap again
# Of embeddings, which parallel=fsdp gathers and whose gradients it shares out: torch's buffer and the weights, and on a
# CPU, whose allocator does not use the same bytes for both, what is sent and gloo's copy of it. Not measured on GPUs.
COPIES = {"cpu": 4, "cuda": 2}
FSDP = {"cpu": 60_000_000, "cuda": 0}  # torch's code for it
USEFUL_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 65536}  # in one forward pass; more do not make it faster


@dataclass(frozen=True)
class Memory:
    """Bytes of one process in use at the fullest moment of a step."""

    weights: int
    optimizer: int
    activations_and_gradients: int
    head: int
    exchange: int  # what comes on top where ranks share a step, 0 where there is one process
    base: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(
    cfg: TrainConfig, vocab_size: int, rows: int, kind: str, dtype: "torch.dtype", ranks: Ranks = ALONE
) -> Memory:
    """For micro-batches of `rows` rows on a device of a `kind` ("cpu", "cuda", "mps"), of the rank that has most rows.

    The state is in equal parts where it is sharded. What ranks exchange: all gradients copied one after the other, when
    activations have gone; or, where weights are sharded, those of embeddings and of two blocks, one of them on its way.
    A rank has all weights in the machine's memory first, before it keeps its part.
    """
    from gpt import loss
    from gpt.machine import counting
    from gpt.machine.sizes import count_gathered, count_sizes, state_bytes

    sizes = count_sizes(cfg.model, cfg.finetune, vocab_size)
    parts, exchange = ranks.count if ranks.is_sharded else 1, 0
    counts = counting.micro_batch(with_rows_of_rank(cfg, ranks.count), vocab_size, rows, kind, dtype, parts)
    optimizer = state_bytes(cfg.model, cfg.finetune, vocab_size, cfg.optimizer, cfg.train.ema)
    activations = round(GAPS * counts.bytes)
    head = loss.head_bytes(counts.tokens, vocab_size, sizes.head, sizes.head_is_trained, kind, dtype.itemsize)
    if ranks.is_sharded:
        block, embeddings = count_gathered(cfg.model, cfg.finetune, vocab_size)
        exchange = FSDP[kind] + 4 * COPIES[kind] * embeddings + 2 * dtype.itemsize * block
        if kind == "cpu":
            exchange = max(exchange, 4 * sizes.held - (4 * sizes.held + optimizer) // parts - activations - head)
    elif ranks.count > 1:
        exchange = max(0, 2 * 4 * sizes.trained - activations - head)
    return Memory(
        weights=4 * sizes.held // parts,
        optimizer=optimizer // parts,
        activations_and_gradients=activations,
        head=head,
        exchange=exchange,
        base=BASE[kind],
    )


def micro_batch(
    cfg: TrainConfig, vocab_size: int, device: "torch.device", dtype: "torch.dtype", recorded: dict[str, Any],
    ranks: Ranks = ALONE,
) -> int:  # fmt: skip
    """Rows in a forward pass: train.micro_batch or, where that is "auto", as many as fit into FREE_SHARE of the free
    memory and still make a step faster, a power of two and no more than a rank has of a step.

    `recorded` is the environment of the run that is resumed, or empty: "auto" is then what it was taken to mean.
    """
    if cfg.train.micro_batch != "auto":
        return cfg.train.micro_batch
    before = recorded.get("micro_batch")
    if type(before) is int and before >= 1:
        console.say(f"train.micro_batch=auto: {before} rows, as before")
        return before
    rows = rows_that_fit(cfg, vocab_size, device, dtype, ranks)
    needed = estimate(cfg, vocab_size, rows, device.type, dtype, ranks).total
    in_step = with_rows_of_rank(cfg, ranks.count).train.rows_per_step(cfg.model.context_length)
    of_each = "in all" if ranks.count == 1 else f"for each of {ranks.count} ranks"
    console.say(f"train.micro_batch=auto: {rows} of {in_step} rows at a time, about {needed / 1e9:.1f} GB {of_each}")
    return rows


def rows_that_fit(cfg: TrainConfig, vocab_size: int, device: "torch.device", dtype: "torch.dtype", ranks: Ranks) -> int:
    """What "auto" means here and now."""
    return fitting_rows(cfg, vocab_size, device.type, dtype, available(device, FREE_SHARE), ranks)


def available(device: "torch.device", share: float = 1.0) -> int:
    """Bytes that this process could have: those that it has, and a share of the free ones. On a CPU the ranks of a
    machine divide those between them."""
    n_sharing = rank_environment.read().local_count if device.type == "cpu" else 1
    return int(share * free_memory.free(device) / n_sharing + free_memory.in_use(device))


def fitting_rows(
    cfg: TrainConfig, vocab_size: int, kind: str, dtype: "torch.dtype", room: int, ranks: Ranks = ALONE
) -> int:
    """The largest useful power of two of rows that takes no more than `room` bytes; 1 if none does."""
    rows = 1
    context_length = cfg.model.context_length
    in_step = with_rows_of_rank(cfg, ranks.count).train.rows_per_step(context_length)
    most = min(in_step, USEFUL_TOKENS[kind] // context_length)
    while 2 * rows <= most and estimate(cfg, vocab_size, 2 * rows, kind, dtype, ranks).total <= room:
        rows *= 2
    return rows


def with_rows_of_rank(cfg: TrainConfig, n_ranks: int) -> TrainConfig:
    """The same run with the steps that the rank with most rows computes, of so many ranks."""
    if n_ranks == 1:
        return cfg
    rows = -(-cfg.train.rows_per_step(cfg.model.context_length) // n_ranks)
    train = dataclasses.replace(cfg.train, tokens_per_step=rows * cfg.model.context_length)
    return dataclasses.replace(cfg, train=train)


def with_micro_batch(cfg: TrainConfig, rows: int) -> TrainConfig:
    """The same run with a number for train.micro_batch."""
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=rows))
