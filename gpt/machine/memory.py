"""Estimates the memory of a step, and chooses how many rows at a time fit.

Bytes are plain counts, 1 GB = 10^9. How far the estimates are from what is measured: tests/machine/test_memory.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt.config.schema import TrainConfig
from gpt.machine import free_memory, rank_environment
from gpt.terminal import console

if TYPE_CHECKING:  # torch takes seconds, and a script reads this file before it knows what to do
    import torch

FREE_SHARE = 0.8  # of the free memory that a micro-batch may be chosen to fill
# Measured on a CPU; those of other devices are guesses.
BASE = {"cpu": 310_000_000, "mps": 310_000_000, "cuda": 300_000_000}  # Python, torch, wandb; on a GPU its workspaces
GAPS = 1.25  # bytes that an allocator holds for each byte in use, as it cannot fill every gap again
USEFUL_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 65536}  # in one forward pass; more do not make it faster


@dataclass(frozen=True)
class Memory:
    """Bytes in use at the fullest moment of a step."""

    weights: int
    optimizer: int
    activations_and_gradients: int
    head: int
    base: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(cfg: TrainConfig, vocab_size: int, rows: int, kind: str, dtype: "torch.dtype") -> Memory:
    """For micro-batches of `rows` rows on a device of a `kind` ("cpu", "cuda", "mps")."""
    from gpt import loss
    from gpt.machine import counting
    from gpt.machine.sizes import count_sizes, state_bytes

    sizes = count_sizes(cfg.model, cfg.finetune, vocab_size)
    counts = counting.micro_batch(cfg, vocab_size, rows, kind, dtype)
    return Memory(
        weights=4 * sizes.held,
        optimizer=state_bytes(cfg.model, cfg.finetune, vocab_size, cfg.optimizer),
        activations_and_gradients=round(GAPS * counts.bytes),
        head=loss.head_bytes(counts.tokens, vocab_size, sizes.head, sizes.head_is_trained, kind, dtype.itemsize),
        base=BASE[kind],
    )


def micro_batch(
    cfg: TrainConfig, vocab_size: int, device: "torch.device", dtype: "torch.dtype", recorded: dict[str, Any]
) -> int:
    """Rows in a forward pass: train.micro_batch or, where that is "auto", as many as fit into FREE_SHARE of the free
    memory and still make a step faster, a power of two and no more than a step has.

    `recorded` is the environment of the run that is resumed, or empty: "auto" is then what it was taken to mean.
    """
    if cfg.train.micro_batch != "auto":
        return cfg.train.micro_batch
    before = recorded.get("micro_batch")
    if type(before) is int and before >= 1:
        console.say(f"train.micro_batch=auto: {before} rows, as before")
        return before
    rows = rows_that_fit(cfg, vocab_size, device, dtype)
    needed = estimate(cfg, vocab_size, rows, device.type, dtype).total
    in_step = cfg.train.rows_per_step(cfg.model.context_length)
    console.say(f"train.micro_batch=auto: {rows} of {in_step} rows at a time, about {needed / 1e9:.1f} GB in all")
    return rows


def rows_that_fit(cfg: TrainConfig, vocab_size: int, device: "torch.device", dtype: "torch.dtype") -> int:
    """What "auto" means here and now."""
    n_sharing = rank_environment.read().local_count if device.type == "cpu" else 1  # ranks with one memory
    room = FREE_SHARE * free_memory.free(device) / n_sharing + free_memory.in_use(device)
    return fitting_rows(cfg, vocab_size, device.type, dtype, int(room))


def fitting_rows(cfg: TrainConfig, vocab_size: int, kind: str, dtype: "torch.dtype", room: int) -> int:
    """The largest useful power of two of rows that takes no more than `room` bytes; 1 if none does."""
    rows = 1
    context_length = cfg.model.context_length
    most = min(cfg.train.rows_per_step(context_length), USEFUL_TOKENS[kind] // context_length)
    while 2 * rows <= most and estimate(cfg, vocab_size, 2 * rows, kind, dtype).total <= room:
        rows *= 2
    return rows


def with_micro_batch(cfg: TrainConfig, rows: int) -> TrainConfig:
    """The same run with a number for train.micro_batch."""
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=rows))
