"""What a run will cost: parameters, memory, arithmetic, steps, tokens and time, before any of it is spent.

Letters: L layers, H heads, C width, T tokens of a row, V tokens in the vocabulary, N parameters. Bytes are plain
counts, 1 GB = 10^9. How far the estimates are from what is measured: tests/test_estimate.py, experiments/speed.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt import console, free_memory
from gpt.schema import ModelConfig, TrainConfig, TrainSection, budget

if TYPE_CHECKING:  # torch takes seconds, and what is pure arithmetic below does without it
    import torch

    from gpt.data import Batch, TrainBatches

FREE_SHARE = 0.8  # of the free memory that a micro-batch may be chosen to fill
# The next five were measured on a CPU; those of other devices are guesses.
BASE = {"cpu": 310_000_000, "mps": 310_000_000, "cuda": 300_000_000}  # Python, torch, wandb; on a GPU its workspaces
EFFICIENCY = 0.78  # speed of a step, without the optimizer, by that of a probe's products; 0.69 to 0.90 were found
OPTIMIZER_BYTES = 28  # for each parameter AdamW reads 16 and writes 12; gradient norm and clipping are lost in it
STARTUP = 6.0  # seconds until the first step, with prepared data
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


@dataclass(frozen=True)
class Rates:
    """How fast a machine is at the matrix products of a model and at reading and writing memory."""

    block_flops: float  # per second
    head_flops: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """What one run will cost. None: not known before the data is prepared."""

    cfg: TrainConfig
    parameters: int
    memory: Memory
    available: int  # bytes that the run could have, those it has already included
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


def block_bytes(model: ModelConfig, itemsize: int, masked: bool, on_cpu: bool) -> int:
    """What one block keeps of each token between forward and backward, following gpt/model.py line by line.

    `itemsize`: 4 in float32, 2 under autocast, where the stream and the norms stay in float32. `masked`: rows hold
    several documents.
    """
    C, H, T, b = model.n_embd, model.n_head, model.context_length, itemsize
    drops = model.dropout > 0
    dropped = (b if on_cpu else 1) * C if drops else 0  # which elements were dropped; on a CPU as numbers
    kept = 4 * C + 8 + b * C  # ln_1: the stream, mean and 1/deviation; its result, which c_attn reads
    if on_cpu and drops:  # scaled_dot_product_attention then computes all of (T, S), and in float32
        kept += 3 * 4 * C  # q and k, scaled, and v
        kept += 3 * 4 * H * T  # softmax, which elements were dropped, the rest
    else:
        kept += 3 * b * C + 4 * H  # q, k, v; the logarithm of each softmax's denominator
        kept += b * T if masked else 0  # the mask as numbers to add
    kept += b * C + dropped  # what attn.c_proj reads; residual_dropout
    kept += 4 * C + 8 + b * C  # ln_2, as above
    kept += 4 * b * C  # what gelu reads
    kept += 4 * b * C + dropped  # what mlp.c_proj reads; residual_dropout
    return kept


def activation_bytes(model: ModelConfig, itemsize: int, masked: bool, on_cpu: bool, checkpointing: bool) -> int:
    """What a step holds of each token when it turns from forward to backward."""
    C, H, T = model.n_embd, model.n_head, model.context_length
    block = block_bytes(model, itemsize, masked, on_cpu)
    kept = model.n_layer * block
    if checkpointing:  # the stream before each block, and what is computed again: up to three blocks were found in use
        kept = model.n_layer * 4 * C + min(3, model.n_layer) * block
    kept += 4 * C if model.dropout > 0 else 0  # of the embedding
    kept += 4 * 4 * C + 24  # ln_f: what it reads and gives, the latter again without unscored positions, its gradient
    kept += 3 * T if masked else 0  # same_document
    # Backward of one block, with what the allocator cannot use again. Measured, as multiples of what is widest in it.
    kept += 20 * itemsize * C
    kept += 14 * H * T if on_cpu and model.dropout > 0 else 0
    return kept


def memory(cfg: TrainConfig, vocab_size: int, rows: int, kind: str, itemsize: int) -> Memory:
    """For micro-batches of `rows` rows on a device of a `kind` ("cpu", "cuda", "mps")."""
    from gpt import loss, optim

    model, C = cfg.model, cfg.model.n_embd
    masked = cfg.data.kind != "text" and cfg.data.batching == "packed"
    N, in_head = model.n_parameters(vocab_size), vocab_size * C
    rows_in_step = cfg.train.rows_per_step(model.context_length)
    n_tokens = min(rows, rows_in_step) * model.context_length
    per_token = activation_bytes(model, itemsize, masked, kind != "cuda", cfg.train.gradient_checkpointing)
    copies = itemsize * 12 * model.n_layer * C * C if itemsize < 4 else 0  # of the blocks' weights, for autocast
    # gpt/loss.py: the logits of a chunk, their softmax, the gradient of the head and, for autocast, copies of both.
    chunk = min(loss.CHUNK, n_tokens)
    group = min(loss.CACHED, chunk) if kind == "cpu" else chunk
    head = chunk * vocab_size * itemsize + 2 * group * vocab_size * 4 + 4 * in_head
    head += 2 * itemsize * in_head if itemsize < 4 else 0
    activations = n_tokens * per_token
    if rows < rows_in_step:  # then gradients are there already, and that of the embedding is added to one
        backward = activations + 4 * N + 4 * in_head
    elif cfg.train.gradient_checkpointing:
        backward = activations + 4 * N
    else:  # gradients take the place of activations
        backward = max(activations, 4 * N)
    return Memory(
        weights=4 * N + copies,
        optimizer=4 * N * optim.TENSORS_PER_PARAMETER[cfg.optimizer.name],
        activations_and_gradients=backward,
        head=head,
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
    needed = memory(cfg, vocab_size, rows, device.type, dtype.itemsize).total
    in_step = cfg.train.rows_per_step(cfg.model.context_length)
    console.say(f"train.micro_batch=auto: {rows} of {in_step} rows at a time, about {needed / 1e9:.1f} GB in all")
    return rows


def rows_that_fit(cfg: TrainConfig, vocab_size: int, device: "torch.device", dtype: "torch.dtype") -> int:
    """What "auto" means here and now."""
    room = FREE_SHARE * free_memory.free(device) + free_memory.in_use(device)
    return fitting_rows(cfg, vocab_size, device.type, dtype.itemsize, int(room))


def fitting_rows(cfg: TrainConfig, vocab_size: int, kind: str, itemsize: int, room: int) -> int:
    """The largest useful power of two of rows that takes no more than `room` bytes; 1 if none does."""
    rows = 1
    context_length = cfg.model.context_length
    most = min(cfg.train.rows_per_step(context_length), USEFUL_TOKENS[kind] // context_length)
    while 2 * rows <= most and memory(cfg, vocab_size, 2 * rows, kind, itemsize).total <= room:
        rows *= 2
    return rows


def flops_per_token(model: ModelConfig, vocab_size: int, checkpointing: bool = False) -> tuple[int, int]:
    """Multiplications and additions, forward and backward, of the blocks and of the head.

    6 for each weight of a matrix, and 12 L T C for attention (Chowdhery et al., "PaLM", 2022, appendix B). Looking up
    an embedding multiplies nothing. With checkpointing, the forward pass of the blocks is computed twice.
    """
    L, C, T = model.n_layer, model.n_embd, model.context_length
    blocks = 6 * 12 * L * C * C + 12 * L * T * C
    return blocks * 4 // 3 if checkpointing else blocks, 6 * vocab_size * C


def run_flops(cfg: TrainConfig, vocab_size: int, steps: int) -> int:
    """Of all steps of a run, what checkpointing computes twice counted once."""
    return steps * cfg.train.tokens_per_step * sum(flops_per_token(cfg.model, vocab_size))


@cache
def probe(device: "torch.device", dtype: "torch.dtype", n_embd: int, vocab_size: int) -> Rates:
    """A few tenths of a second of each kind of work that a step consists of."""
    import torch

    def rate(rows: int, width: int) -> float:
        """Operations per second of (rows, C) x (C, width); of fewer rows where they take long (bfloat16, emulated)."""
        weight = torch.ones(depth, width, device=device, dtype=dtype)
        n = 1
        while n < rows and duration(lambda n=n: weight.new_ones(n, depth) @ weight, device, at_least=0.0) < 0.1:
            n = min(rows, 8 * n)
        x = weight.new_ones(n, depth)
        return 2 * n * depth * width / duration(lambda: x @ weight, device)

    depth = min(n_embd, 2048)  # wider ones are no faster, and a model that does not fit shall have an estimate too
    source = torch.ones(2**24, device=device)  # 64 MiB, more than caches hold
    target = torch.empty_like(source)
    return Rates(
        block_flops=rate(1024, 4 * depth),
        head_flops=rate(512, min(vocab_size, 8192)),
        bytes=2 * source.nbytes / duration(lambda: target.copy_(source), device),
    )


def duration(work: Callable[[], Any], device: "torch.device", at_least: float = 0.1) -> float:
    """Seconds that `work()` takes: the shortest of several times, as all else on the machine only adds to it. Goes on
    for `at_least` so many seconds."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - started

    times = [once(), once()]  # the first one is slower: threads and kernels are made
    while sum(times) < at_least:
        times.append(once())
    return min(times)


def of_run(cfg: TrainConfig, root: Path) -> Cost:
    """What a run from its first step to its last will cost. Writes nothing; prepared data is read if it is there.

    Raises UserError for what would stop the run itself: a device, data or a budget that do not suit it.
    """
    from gpt import compilation, corpus, data, device, loop, optim, sources, tokenizer

    where, dtype, environment = device.choose(cfg.device, cfg.train, {})
    vocab_size = tokenizer.load(cfg.data.tokenizer).n_vocab
    prepared = corpus.find(cfg.data, root)
    rows = cfg.train.micro_batch
    if rows == "auto":
        rows = rows_that_fit(cfg, vocab_size, where, dtype)
    needed = memory(cfg, vocab_size, rows, where.type, dtype.itemsize)
    steps = tokens = seconds = None
    length, note, work = None, "", Work.expected(cfg.train)
    if prepared:
        batches, val_batches = data.open_batches(prepared, with_micro_batch(cfg, rows), vocab_size)
        length, work = loop.count_steps(cfg.train, batches), Work.of(batches, val_batches)
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
        flops = run_flops(cfg, vocab_size, steps)
        environment["compile"] = compilation.decide(cfg.train, {}, where, dtype, flops)
        seconds = run_seconds(cfg, work, steps, probe(where, dtype, cfg.model.n_embd, vocab_size), vocab_size)
        if environment["compile"]:
            seconds = compilation.COST + seconds * (
                1 - compilation.SAVED[str(dtype).removeprefix("torch.")]
            )  # tf32 is a float32
    return Cost(
        cfg=cfg,
        parameters=cfg.model.n_parameters(vocab_size),
        memory=needed,
        available=free_memory.free(where) + free_memory.in_use(where),
        micro_batch=rows,
        steps=steps,
        budget=length[1] if length else "train.max_epochs",
        tokens=tokens,
        seconds=seconds,
        where=device.describe(where, environment),
        note=note,
    )


def with_micro_batch(cfg: TrainConfig, rows: int) -> TrainConfig:
    """The same run with a number for train.micro_batch."""
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=rows))


@dataclass(frozen=True)
class Work:
    """An average step, and an evaluation. Slots are places in rows, padding and prompts included."""

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


def run_seconds(cfg: TrainConfig, work: Work, steps: int, rates: Rates, vocab_size: int) -> float:
    """The whole run: its start, its steps, its evaluations and its samples. Checkpoints come on top."""
    train, n_parameters = cfg.train, cfg.model.n_parameters(vocab_size)
    blocks, head = flops_per_token(cfg.model, vocab_size, train.gradient_checkpointing)
    in_step = work.slots * blocks / rates.block_flops + work.targets * head / rates.head_flops
    in_evaluation = work.eval_slots * blocks / rates.block_flops + work.eval_targets * head / rates.head_flops
    evaluations = 1 + math.ceil(steps / train.eval_every)
    samples = math.ceil(steps / train.sample_every) if train.sample_every else 0
    return (
        STARTUP
        + steps * (in_step / EFFICIENCY + OPTIMIZER_BYTES * n_parameters / rates.bytes)
        + evaluations * in_evaluation / 3 / EFFICIENCY  # forward only
        + samples * cfg.sample.max_new_tokens * 4 * n_parameters / rates.bytes  # each token reads all weights
    )
