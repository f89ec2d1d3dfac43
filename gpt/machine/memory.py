"""Bytes in use at the fullest moment of a step, and how many rows at a time they leave room for.

Letters: L layers, H heads, C width, T tokens of a row. Bytes are plain counts, 1 GB = 10^9. How far the estimates are
from what is measured: tests/test_memory.py, experiments/speed.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt import finetune
from gpt.config.families import ModelConfig
from gpt.config.schema import FinetuneConfig, LoRAConfig, TrainConfig
from gpt.machine import free_memory
from gpt.terminal import console

if TYPE_CHECKING:  # torch takes seconds, and what is pure arithmetic below does without it
    import torch

FREE_SHARE = 0.8  # of the free memory that a micro-batch may be chosen to fill
# Measured on a CPU; those of other devices are guesses.
BASE = {"cpu": 310_000_000, "mps": 310_000_000, "cuda": 300_000_000}  # Python, torch, wandb; on a GPU its workspaces
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


def n_held(model: ModelConfig, cfg: FinetuneConfig | None, vocab_size: int) -> int:
    """Numbers in the weights of a model while it is trained: its own, and those of adapters."""
    return model.n_parameters(vocab_size) + (finetune.n_trainable(model, cfg, vocab_size) if cfg and cfg.lora else 0)


def trains_embeddings(cfg: FinetuneConfig | None) -> bool:
    """Whether those of tokens and positions have gradients."""
    return cfg is None or cfg.name == "full"


def trains_head(model: ModelConfig, cfg: FinetuneConfig | None) -> bool:
    """Whether the head has a gradient: a tied one is the embedding of the tokens."""
    return trains_embeddings(cfg) or (cfg.name == "last_blocks" and not model.tie_weights)


def n_reached(model: ModelConfig, cfg: FinetuneConfig | None) -> int:
    """Blocks that the backward pass reaches. Those below, where nothing has a gradient, keep nothing for it."""
    return cfg.n_blocks if cfg and cfg.name == "last_blocks" else model.n_layer


def block_bytes(
    model: ModelConfig, itemsize: int, masked: bool, on_cpu: bool, adapters: LoRAConfig | None = None
) -> int:
    """What one block keeps of each token between forward and backward, following gpt/model.py line by line.

    `itemsize`: 4 in float32, 2 under autocast, where the stream and the norms stay in float32. `masked`: rows hold
    several documents. `adapters`: all other weights are frozen. A product with frozen weights does not keep what it
    reads, as only their gradient would need it; an adapter does.
    """
    C, H, T, b = model.n_embd, model.n_head, model.context_length, itemsize
    drops = model.dropout > 0
    computes_all = on_cpu and drops  # scaled_dot_product_attention then computes all of (T, S), and in float32
    dropped = (b if on_cpu else 1) * C if drops else 0  # which elements were dropped; on a CPU as numbers

    def keeps(target: str) -> bool:
        return adapters is None or target in adapters.targets

    kept = 4 * C + 8 + b * C * keeps("attn.c_attn")  # ln_1: the stream, mean and 1/deviation; its result
    if computes_all:
        kept += 3 * 4 * C  # q and k, scaled, and v
        kept += 3 * 4 * H * T  # softmax, which elements were dropped, the rest
    else:
        kept += 3 * b * C + 4 * H  # q, k, v; the logarithm of each softmax's denominator
        kept += b * T if masked else 0  # the mask as numbers to add
    kept += b * C * (keeps("attn.c_proj") or not computes_all)  # the result of attention, which it needs itself too
    kept += dropped  # residual_dropout
    kept += 4 * C + 8 + b * C * keeps("mlp.c_fc")  # ln_2, as above
    kept += 4 * b * C  # what gelu reads
    kept += 4 * b * C * keeps("mlp.c_proj") + dropped  # its result; residual_dropout
    kept += b * adapters.rank * len(adapters.targets) if adapters else 0  # between the two matrices of each
    return kept


def activation_bytes(cfg: TrainConfig, itemsize: int, masked: bool, on_cpu: bool) -> int:
    """What a step holds of each token when it turns from forward to backward."""
    model = cfg.model
    C, H, T = model.n_embd, model.n_head, model.context_length
    L = n_reached(model, cfg.finetune)
    block = block_bytes(model, itemsize, masked, on_cpu, cfg.finetune and cfg.finetune.lora)
    kept = L * block
    if cfg.train.gradient_checkpointing:  # the stream before each block, and what is computed again: up to three blocks
        kept = L * 4 * C + min(3, L) * block  # were found in use
    kept += 4 * C if model.dropout > 0 and trains_embeddings(cfg.finetune) else 0  # of the embedding
    kept += 4 * 4 * C + 24  # ln_f: what it reads and gives, the latter again without unscored positions, its gradient
    kept += 3 * T if masked else 0  # same_document
    # Backward of one block, with what the allocator cannot use again. Measured, as multiples of what is widest in it.
    kept += 20 * itemsize * C
    kept += 14 * H * T if on_cpu and model.dropout > 0 else 0
    if cfg.finetune and cfg.finetune.lora:  # likewise: the product of the weights, that of the adapter, their sum
        kept += 3 * itemsize * C * sum(finetune.LINEAR[target][1] for target in cfg.finetune.targets)
    return kept


def of_step(cfg: TrainConfig, vocab_size: int, rows: int, kind: str, itemsize: int) -> Memory:
    """For micro-batches of `rows` rows on a device of a `kind` ("cpu", "cuda", "mps")."""
    from gpt import loss, optim

    model, C = cfg.model, cfg.model.n_embd
    masked = cfg.data.kind != "text" and cfg.data.batching == "packed"
    trained, in_head = finetune.n_trainable(model, cfg.finetune, vocab_size), vocab_size * C
    rows_in_step = cfg.train.rows_per_step(model.context_length)
    n_tokens = min(rows, rows_in_step) * model.context_length
    per_token = activation_bytes(cfg, itemsize, masked, kind != "cuda")
    # Of the blocks' weights, for autocast. Those of frozen blocks are there for the time of a product only.
    copies = itemsize * 12 * n_reached(model, cfg.finetune) * C * C if itemsize < 4 else 0
    # gpt/loss.py: the logits of a chunk, their softmax, the gradient of the head and, for autocast, copies of both.
    chunk = min(loss.CHUNK, n_tokens)
    group = min(loss.CACHED, chunk) if kind == "cpu" else chunk
    head = chunk * vocab_size * itemsize + 2 * group * vocab_size * 4
    head += 4 * in_head if trains_head(model, cfg.finetune) else 0
    head += 2 * itemsize * in_head if itemsize < 4 else 0  # of a frozen head too, padded: before and after
    activations = n_tokens * per_token
    if rows < rows_in_step:  # then gradients are there already, and that of the embedding is added to one
        backward = activations + 4 * trained + (4 * in_head if trains_embeddings(cfg.finetune) else 0)
    elif cfg.train.gradient_checkpointing:
        backward = activations + 4 * trained
    else:  # gradients take the place of activations
        backward = max(activations, 4 * trained)
    return Memory(
        weights=4 * n_held(model, cfg.finetune, vocab_size) + copies,
        optimizer=4 * trained * optim.TENSORS_PER_PARAMETER[cfg.optimizer.name],
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
    needed = of_step(cfg, vocab_size, rows, device.type, dtype.itemsize).total
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
    while 2 * rows <= most and of_step(cfg, vocab_size, 2 * rows, kind, itemsize).total <= room:
        rows *= 2
    return rows


def with_micro_batch(cfg: TrainConfig, rows: int) -> TrainConfig:
    """The same run with a number for train.micro_batch."""
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=rows))
