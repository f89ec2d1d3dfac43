"""Estimates what a run will cost before any of it is spent: parameters, memory, operations, steps, tokens and time.

How far the estimates are from what is measured: tests/machine/test_cost.py, experiments/speed.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.config.schema import TrainConfig, TrainSection
from gpt.machine import memory, rank_environment
from gpt.machine.ranks import Planned
from gpt.progress import budget

if TYPE_CHECKING:  # torch takes seconds, and a script reads this file before it knows what to do
    from gpt.data.batching import Batch, TrainBatches
    from gpt.machine.machine import Machine
    from gpt.machine.rates import Rates

# Measured on a CPU.
OPTIMIZER_BYTES = 28  # for each parameter AdamW reads 16 and writes 12; gradient norm and clipping are lost in it
STARTUP = 6.0  # seconds until the first step, with prepared data


@dataclass(frozen=True)
class Cost:
    """What one run will cost. None: not known before the data is prepared; and the time, where nothing of it fits."""

    cfg: TrainConfig
    parameters: int
    trained: int  # of the parameters, or those of adapters, which come on top
    ranks: int
    memory: memory.Memory  # of each rank
    available: int  # bytes that a rank could have, those it has already included
    micro_batch: int
    steps: int | None
    budget: str  # the key that decides the number of steps
    tokens: int | None
    seconds: float | None
    where: str
    note: str

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions for a token: of the blocks, and of the head."""

    forward: float
    blocks: float  # forward and backward
    head: float

    @property
    def total(self) -> float:
        return self.blocks + self.head


def count_operations(cfg: TrainConfig, vocab_size: int, machine: "Machine") -> Operations:
    """Those of a step. With gradient checkpointing, what is computed twice counts twice."""
    from gpt import loss
    from gpt.machine import counting
    from gpt.machine.sizes import count_sizes

    sizes = count_sizes(cfg.model, cfg.finetune, vocab_size)
    rows, kind = machine.environment["micro_batch"], machine.device.type
    # The arguments are those of memory.estimate: one pass serves both.
    counts = counting.micro_batch(cfg, vocab_size, rows, kind, machine.dtype)
    return Operations(
        forward=counts.forward / counts.tokens,
        blocks=(counts.forward + counts.backward) / counts.tokens,
        head=loss.head_operations(1, sizes.head, sizes.head_is_trained),
    )


def run_operations(cfg: TrainConfig, vocab_size: int, steps: int, machine: "Machine") -> float:
    """Those of all steps of a run, what checkpointing computes twice counted once."""
    once = replace(cfg, train=replace(cfg.train, gradient_checkpointing=False))
    return steps * cfg.train.tokens_per_step * count_operations(once, vocab_size, machine).total


def operations_to_compile(cfg: TrainConfig, vocab_size: int, steps: int, machine: "Machine") -> float:
    """`run_operations`; for a run that is short at four times the operations of its weights, that bound, which takes
    half a second less to know."""
    from gpt.machine import compilation
    from gpt.machine.sizes import count_sizes

    held = count_sizes(cfg.model, cfg.finetune, vocab_size).held
    bound = 4 * 6 * held * steps * cfg.train.tokens_per_step
    is_long = compilation.is_long(machine, bound)
    return run_operations(cfg, vocab_size, steps, machine) if is_long else bound


def estimate(cfg: TrainConfig, root: Path) -> Cost:
    """The cost of a run from its first step to its last. Writes nothing; prepared data is read if it is there.

    Raises UserError for what would stop the run itself: a device, data or a budget that do not suit it.
    """
    from gpt import optim, tokenizer
    from gpt.data import batching, prepared, sources
    from gpt.machine import compilation, device, rates
    from gpt.machine.machine import Machine
    from gpt.machine.sizes import count_sizes

    where, dtype, environment = device.choose(cfg.device, cfg.train, {}, cfg.threads)
    vocab_size = tokenizer.load(cfg.data.tokenizer).n_vocab
    data = prepared.find(cfg.data, root, sources.path_is_typed(cfg.overrides, cfg.out_dir))
    ranks = Planned(rank_environment.read().count, cfg.parallel.name == "fsdp")
    rows = cfg.train.micro_batch
    if rows == "auto":
        rows = memory.rows_that_fit(cfg, vocab_size, where, dtype, ranks)
    machine = Machine(where, dtype, environment | {"micro_batch": rows}, ranks)
    steps = tokens = seconds = None
    length, note, work = None, "", Work.expected(cfg.train)
    if data:
        batches = batching.open_batches(data, memory.with_micro_batch(cfg, rows), vocab_size)
        length, work = (batches.total_steps, batches.budget), Work.of(batches.train, batches.validation)
        note = ranks.idle(batches.train.rows_in_step, cfg.model.context_length)
    else:
        sources.find(cfg.data, root)
        note = f"data={cfg.data.name} is not prepared yet"
        if cfg.train.max_epochs is None:
            length = budget(cfg.train.max_steps, None, cfg.train.max_tokens, cfg.train.tokens_per_step)
        else:
            note += ", so the length of an epoch is not known; `python prepare_data.py` first"
    if length:
        steps = length[0]
        optim.check_schedule(cfg.schedule, steps)
        tokens = round(steps * work.tokens)
        operations = operations_to_compile(cfg, vocab_size, steps, machine)
        environment["compile"] = compilation.decide(cfg.train, {}, machine, operations)
        n_targets = math.ceil(work.targets * rows * cfg.model.context_length / work.slots)
        measured = rates.measure(cfg, vocab_size, min(n_targets, math.ceil(work.targets)), machine)
        seconds = measured and run_seconds(cfg, work, steps, measured, vocab_size, machine)
        if seconds and environment["compile"]:
            seconds = compilation.COST + seconds * (1 - compilation.SAVED[dtype])
    sizes = count_sizes(cfg.model, cfg.finetune, vocab_size)
    return Cost(
        cfg=cfg,
        parameters=sizes.parameters,
        trained=sizes.trained,
        ranks=ranks.count,
        memory=memory.estimate(cfg, vocab_size, rows, where.type, dtype, ranks),
        available=memory.available(where),
        micro_batch=rows,
        steps=steps,
        budget=length[1] if length else "train.max_epochs",
        tokens=tokens,
        seconds=seconds,
        where=device.describe(where, environment),
        note=note,
    )


@dataclass(frozen=True)
class Work:
    """An average step and an evaluation. Slots are places in rows, padding and prompts included."""

    tokens: float
    slots: float
    targets: float
    eval_slots: int
    eval_targets: int

    @classmethod
    def expected(cls, train: TrainSection) -> "Work":
        """Before there is data: rows without padding; an evaluation's windows overlap by half."""
        n = train.tokens_per_step
        return cls(n, n, n, 2 * train.eval_tokens, train.eval_tokens)

    @classmethod
    def of(cls, batches: "TrainBatches", val_batches: list["Batch"]) -> "Work":
        """From a few steps of the first epoch."""
        chosen = range(0, batches.steps_per_epoch, max(1, batches.steps_per_epoch // 8))
        seen = [batch for step in chosen for batch in batches.step(step)]
        return cls(
            sum(batch.n_tokens for batch in seen) / len(chosen),
            sum(batch.inputs.numel() for batch in seen) / len(chosen),
            sum(batch.n_targets for batch in seen) / len(chosen),
            sum(batch.inputs.numel() for batch in val_batches),
            sum(batch.n_targets for batch in val_batches),
        )


def run_seconds(cfg: TrainConfig, work: Work, steps: int, rates: "Rates", vocab_size: int, machine: "Machine") -> float:
    """The whole run: its start, its steps, its evaluations and its samples. Checkpoints come on top, and so does what
    ranks exchange. They share a step by rows and an evaluation by batches, and the one that has most decides."""
    from gpt.machine.sizes import count_sizes

    train, sizes, ranks = cfg.train, count_sizes(cfg.model, cfg.finetune, vocab_size), machine.ranks
    count = count_operations(cfg, vocab_size, machine)
    in_step = work.slots * count.blocks / rates.block_flops + work.targets * count.head / rates.head_flops
    in_step *= largest_share(train.rows_per_step(cfg.model.context_length), ranks.count)
    in_evaluation = work.eval_slots * count.forward / rates.block_flops
    in_evaluation += work.eval_targets * 2 * sizes.head / rates.head_flops
    batch_slots = machine.environment["micro_batch"] * cfg.model.context_length
    in_evaluation *= largest_share(math.ceil(work.eval_slots / batch_slots), ranks.count)
    updated = sizes.trained / (ranks.count if ranks.is_sharded else 1)
    evaluations = 1 + math.ceil(steps / train.eval_every)
    samples = math.ceil(steps / train.sample_every) if train.sample_every else 0
    return (
        STARTUP
        + steps * (in_step + OPTIMIZER_BYTES * updated / rates.bytes)
        + evaluations * in_evaluation
        + samples * cfg.sample.max_new_tokens * 4 * sizes.parameters / rates.bytes  # each token reads all weights
    )


def largest_share(n: int, n_ranks: int) -> float:
    """Of `n` rows or batches, what the rank with most of them has."""
    return math.ceil(n / n_ranks) / n
