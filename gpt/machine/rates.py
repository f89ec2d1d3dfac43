"""Measures how fast this machine computes the blocks and the head of a model, and how fast it moves memory.

Products of matrices alone would be no measure: in bfloat16 a step takes as long for what lies between them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from gpt import loss
from gpt.config.families import ModelConfig
from gpt.config.schema import FinetuneConfig, TrainConfig
from gpt.machine import counting, memory
from gpt.machine.machine import Machine
from gpt.machine.sizes import ByValue, build, count_sizes

BLOCKS = 2  # that stand for all: the last one may have another attention than those before
LONG = 1.0  # seconds; a pass that takes as long is a measure, even if that of a micro-batch would be larger


@dataclass(frozen=True)
class Rates:
    """Operations of a forward and backward pass in a second, all that comes with them included, and bytes."""

    block_flops: float
    head_flops: float
    bytes: float


def measure(cfg: TrainConfig, vocab_size: int, n_targets: int, machine: Machine) -> Rates | None:
    """The rates of a run's micro-batches, with so many targets each; takes a few seconds. None where not even a model
    of BLOCKS blocks fits into memory."""
    kind, rows = machine.device.type, machine.environment["micro_batch"]
    n_layer, length = min(BLOCKS, cfg.model.n_layer), min(cfg.model.context_length, memory.USEFUL_TOKENS[kind])
    model = replace(cfg.model, n_layer=n_layer, context_length=length)
    rows = min(rows, memory.USEFUL_TOKENS[kind] // length)
    chosen = cfg.finetune if cfg.lora else None  # where only some blocks are trained, these are as fast as others
    small = replace(cfg, model=model, finetune=chosen)
    if memory.estimate(small, vocab_size, rows, kind, machine.dtype).total > memory.available(machine.device):
        return None
    sizes, masked = count_sizes(cfg.model, cfg.finetune, vocab_size), counting.is_masked(cfg.data)
    checkpointing, where = cfg.train.gradient_checkpointing, (machine.device, machine.dtype)
    return Rates(
        block_flops=block_rate(model, chosen, rows, masked, checkpointing, *where),
        head_flops=head_rate(cfg.model.n_embd, vocab_size, sizes.head_is_trained, n_targets, *where),
        bytes=memory_rate(machine.device),
    )


@ByValue
def block_rate(
    cfg: ModelConfig, chosen: FinetuneConfig | None, rows: int, masked: bool, checkpointing: bool,
    device: torch.device, dtype: torch.dtype,
) -> float:  # fmt: skip
    """Operations per second of the blocks of a model, forward and backward, with micro-batches of `rows` rows, or of
    fewer and shorter ones where these take long (bfloat16, emulated)."""
    with device:
        model = build(cfg, chosen, vocab_size=1).train()
    model.gradient_checkpointing = checkpointing
    shape = 1, min(64, cfg.context_length)

    def work() -> None:
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        with Machine(device, dtype).autocast():
            stream = model.hidden(tokens, documents=tokens if masked else None)
        stream.backward(torch.ones_like(stream))

    while shape != (rows, cfg.context_length) and shortest_duration(work, device, at_least=0.0) < LONG:
        n, length = shape
        is_whole = length == cfg.context_length
        shape = (min(rows, 4 * n), length) if is_whole else (n, min(cfg.context_length, 4 * length))
    counted = replace(cfg, context_length=shape[1])
    counts = counting.step(
        counted, chosen, 1, shape[0], masked=masked, kind=device.type, dtype=dtype, checkpointing=checkpointing
    )
    return (counts.forward + counts.backward) / shortest_duration(work, device)


@cache
def head_rate(
    width: int, vocab_size: int, is_trained: bool, n_targets: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Operations per second of the head and the loss of `n_targets` positions, or of fewer where these take long."""
    head = torch.ones(vocab_size, width, device=device, requires_grad=is_trained)
    n = min(8, n_targets)

    def work() -> None:
        hidden = torch.ones(n, width, device=device, requires_grad=True)
        targets = torch.zeros(n, dtype=torch.long, device=device)
        with Machine(device, dtype).autocast():
            summed = loss.cross_entropy_sum(hidden, head, targets)
        summed.backward()

    while n < n_targets and shortest_duration(work, device, at_least=0.0) < LONG:
        n = min(n_targets, 8 * n)
    return loss.head_operations(n, head.numel(), is_trained) / shortest_duration(work, device)


@cache
def memory_rate(device: torch.device) -> float:
    """Bytes that are read or written in a second."""
    source = torch.ones(2**24, device=device)  # 64 MiB, more than caches hold
    target = torch.empty_like(source)
    return 2 * source.nbytes / shortest_duration(lambda: target.copy_(source), device)


def read_rate(device: torch.device, n_bytes: int = 2**28) -> float:
    """Bytes that are read in a second, at this moment, where the same `n_bytes` are read again and again: as many as
    caches hold come from these. It is measured each time, for a third of a second."""
    source = torch.ones(max(1, n_bytes // 4), device=device)
    return source.nbytes / shortest_duration(source.sum, device, at_least=0.3)


def shortest_duration(work: Callable[[], Any], device: torch.device, at_least: float = 0.25) -> float:
    """The shortest of two or more `duration`s within `at_least` so many seconds: the first one makes threads and
    kernels, and all else on the machine only adds to them. Where threads have to wait for each other on a busy one, a
    median was five times what whole steps took."""
    times = duration(work, device), duration(work, device)
    least, total = min(times), sum(times)
    while total < at_least:
        last = duration(work, device)
        least, total = min(least, last), total + last
    return least


def duration(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work()` takes."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started
