"""The training loop. `fit` yields after each logged step; whoever iterates over it logs, samples and saves.

Losses are weighted by tokens everywhere: the loss of a step is the mean over all its targets, however they are spread
over rows and micro-batches, and the validation loss is the mean over all validation targets.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gpt import optim
from gpt.data import IGNORE, Batch, TrainBatches
from gpt.errors import NUMERICAL, UserError
from gpt.model import GPT
from gpt.sampling import generate_text_simple, text_to_token_ids, token_ids_to_text
from gpt.schema import ScheduleConfig, TrainSection

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is: everything that the loop remembers from one step to the next."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # tokens read, padding not counted
    best: float = math.inf  # lowest validation loss
    best_step: int = 0
    stale: int = 0  # evaluations since then
    loss_sum: float = 0.0  # of the targets since the last logged step ...
    loss_targets: int = 0  # ... and their number


@dataclass(frozen=True)
class Event:
    """What `fit` reports: a row of metrics, and what is due now, while model and optimizer are consistent."""

    row: dict[str, float]
    sample_due: bool = False
    checkpoint_due: bool = False
    last: bool = False


def token_losses(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N,) -ln p(target) in nats and (N,) ids of the N scored targets. Logits are computed at these positions only."""
    hidden = model.hidden(batch.inputs, batch.positions, batch.documents)  # (B, T, C)
    scored = batch.targets != IGNORE  # (B, T), true N times
    targets = batch.targets[scored]  # (N,)
    logits = model.logits(hidden[scored])  # (N, V)
    return F.cross_entropy(logits.float(), targets, reduction="none"), targets


def batch_loss(model: GPT, batch: Batch) -> Tensor:
    """Sum of the losses of a batch's scored targets."""
    return token_losses(model, batch)[0].sum()


def train_step(
    model: GPT,
    optimizer: optim.Optimizer,
    micro_batches: list[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    grad_clip: float | None = None,
) -> tuple[float, float]:
    """One optimizer step: forward and backward for each micro-batch, clip, step. Returns loss and gradient norm.

    When either is not finite, the weights are left as they were.
    """
    n_targets = sum(batch.n_targets for batch in micro_batches)
    loss = 0.0
    for batch in micro_batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            part = batch_loss(model, batch.to(device)) / n_targets
        part.backward()
        loss += part.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if math.isfinite(loss) and math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    bytes_per_token: Tensor | None = None,
) -> dict[str, float]:
    """Mean loss per target in nats, its perplexity and, with the (V,) length of each token, bits per byte of text.

    Targets without bytes (the end of a text) count in the loss but not in the bits per byte.
    """
    was_training = model.training
    model.eval()
    loss_sum, n_targets, nats, n_bytes = 0.0, 0, 0.0, 0
    try:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                losses, targets = token_losses(model, batch.to(device))
            loss_sum += losses.sum(dtype=torch.float64 if device.type != "mps" else None).item()
            n_targets += len(targets)
            if bytes_per_token is not None:
                lengths = bytes_per_token[targets]
                nats += losses[lengths > 0].sum().item()
                n_bytes += int(lengths.sum())
    finally:
        model.train(was_training)
    loss = loss_sum / n_targets
    metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}  # e^709 is the largest float
    if n_bytes:
        metrics["val/bpb"] = nats / math.log(2) / n_bytes
    return metrics


def count_steps(cfg: TrainSection, batches: TrainBatches) -> tuple[int, str]:
    """The length of a run in optimizer steps, and the key that decides it."""
    limits = []
    if cfg.max_steps is not None:
        limits.append((cfg.max_steps, "train.max_steps"))
    if cfg.max_epochs is not None:
        limits.append((cfg.max_epochs * batches.steps_per_epoch, "train.max_epochs"))
    if not limits and cfg.max_tokens is not None:
        limits.append((max(1, round(cfg.max_tokens / cfg.tokens_per_step)), "train.max_tokens"))
    if not limits:
        raise UserError("a run needs a budget", remedy="set train.max_steps, train.max_epochs or train.max_tokens")
    return min(limits)


def fit(
    model: GPT,
    optimizer: optim.Optimizer,
    batches: TrainBatches,
    val_batches: list[Batch],
    cfg: TrainSection,
    schedule: ScheduleConfig,
    total_steps: int,
    progress: Progress,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    bytes_per_token: Tensor | None = None,
) -> Iterator[Event]:
    """Trains from `progress` to `total_steps`, or until `cfg.patience` evaluations brought nothing better.

    Yields before the first step, after each logged step and each evaluation, and when samples or a checkpoint are
    due. Raises UserError (4), with the weights as they were before, when a loss or a gradient is not finite.
    """

    def evaluated() -> dict[str, float]:
        metrics = evaluate(model, val_batches, device, dtype, bytes_per_token)
        if metrics["val/loss"] < progress.best:
            progress.best, progress.best_step, progress.stale = metrics["val/loss"], progress.step, 0
        else:
            progress.stale += 1
        return metrics

    model.train()
    if progress.step == 0:
        yield Event({"step": 0, "tokens": 0, **evaluated()})
    seconds, tokens_before = 0.0, progress.tokens  # since the last logged step, training only
    while not is_finished(progress, cfg, total_steps):
        started = time.perf_counter()
        optim.set_lr(optimizer, optim.lr_factor(schedule, progress.step, total_steps))
        micro_batches = batches.step(0 if cfg.one_batch else progress.step)
        # Dropout draws from the global generator: with a seed of its own for each step, whatever else draws from it
        # in between (samples, evaluation) changes nothing, and a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence([seed, progress.step]).generate_state(1, np.uint64)[0]))
        loss, grad_norm = train_step(model, optimizer, micro_batches, device, dtype, cfg.grad_clip)
        seconds += time.perf_counter() - started

        n_targets = sum(batch.n_targets for batch in micro_batches)
        progress.step += 1
        progress.tokens += sum(batch.n_tokens for batch in micro_batches)
        progress.loss_sum += loss * n_targets
        progress.loss_targets += n_targets
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "train/loss": progress.loss_sum / progress.loss_targets,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
        }
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            yield Event(row)
            raise UserError(
                f"training stopped at step {progress.step}: loss {loss}, gradient norm {grad_norm}",
                f"learning rate {row['lr']:.3g}, batch {progress.step - 1} of seed {seed}",
                "lower optimizer.lr or set train.grad_clip; earlier checkpoints are intact", NUMERICAL,
            )  # fmt: skip

        step, last = progress.step, progress.step == total_steps
        log_due = last or step % cfg.log_every == 0
        eval_due = last or step % cfg.eval_every == 0
        sample_due = cfg.sample_every is not None and (last or step % cfg.sample_every == 0)
        checkpoint_due = last or step % cfg.save_every == 0
        if not (log_due or eval_due or sample_due or checkpoint_due):
            continue
        if log_due:
            row |= {"tokens_per_second": (progress.tokens - tokens_before) / seconds, "memory_gb": memory_gb(device)}
            progress.loss_sum, progress.loss_targets = 0.0, 0
            seconds, tokens_before = 0.0, progress.tokens
        else:
            del row["train/loss"]  # its interval is not over
        if eval_due:
            row |= evaluated()
            checkpoint_due = checkpoint_due or progress.best_step == step
            last = is_finished(progress, cfg, total_steps)
        yield Event(row, sample_due or (last and cfg.sample_every is not None), checkpoint_due or last, last)


def is_finished(progress: Progress, cfg: TrainSection, total_steps: int) -> bool:
    """Whether a run has come to its end: all steps taken, or `cfg.patience` evaluations without a better one."""
    return progress.step >= total_steps or (cfg.patience is not None and progress.stale >= cfg.patience)


def memory_gb(device: torch.device) -> float:
    """The most memory in use so far, in 10^9 bytes: of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def train_model_simple(
    model: GPT,
    train_loader: DataLoader,
    val_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """The notebook's loop: returns (train_losses, val_losses, tokens_seen), one entry for each evaluation.

    Evaluates after steps 0, eval_freq, 2 eval_freq, ... on the first `eval_iter` batches of each loader, unshuffled,
    so that measuring does not change the order of training; prints a sample after each epoch.
    """
    device = torch.device(device)
    model.to(device)
    train_losses, val_losses, tokens_seen = [], [], []
    seen, step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for inputs, targets in train_loader:
            batch = as_batch(inputs, targets)
            train_step(model, optimizer, [batch], device)
            seen += inputs.numel()
            step += 1
            if step % eval_freq == 0:
                train_losses.append(evaluate(model, first_batches(train_loader, eval_iter), device)["val/loss"])
                val_losses.append(evaluate(model, first_batches(val_loader, eval_iter), device)["val/loss"])
                tokens_seen.append(seen)
                print(f"epoch {epoch + 1} step {step:06d}  train {train_losses[-1]:.3f}  val {val_losses[-1]:.3f}")
        prompt = text_to_token_ids(start_context, tokenizer).to(device)
        ids = generate_text_simple(model, prompt, 50, model.config.context_length)
        print(token_ids_to_text(ids, tokenizer).replace("\n", " "))
    return train_losses, val_losses, tokens_seen


def as_batch(inputs: Tensor, targets: Tensor) -> Batch:
    """A loader's (inputs, targets) pair as a Batch."""
    return Batch(inputs, targets, None, None, inputs.numel(), int((targets != IGNORE).sum()))


def first_batches(loader: DataLoader, n: int) -> list[Batch]:
    """The first `n` batches of a loader in the order of its data set, without touching the loader's own generator."""
    ordered = DataLoader(
        loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn, generator=torch.Generator()
    )
    return [as_batch(*pair) for pair, _ in zip(ordered, range(n), strict=False)]
