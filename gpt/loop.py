"""The training loop. `fit` yields after each logged step; whoever iterates over it logs, samples and saves.

Losses are weighted by tokens everywhere: the loss of a step is the mean over all its targets, however they are spread
over rows and micro-batches, and the validation loss is the mean over all validation targets.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt import optim
from gpt.config.schema import ScheduleConfig, TrainSection
from gpt.data.batching import IGNORE, Batch, TrainBatches
from gpt.data.read_ahead import ReadAhead
from gpt.errors import NUMERICAL, UserError
from gpt.loss import summed_loss, token_losses
from gpt.machine.device import memory_gb
from gpt.model import GPT
from gpt.progress import Progress, due_at, is_finished, rescaled, scored
from gpt.sampling import eval_mode, generate_text_simple, text_to_token_ids, token_ids_to_text
from gpt.terminal.console import escape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What `fit` reports: a row of metrics, and what is due now, while model and optimizer are consistent.

    Going on later from `progress` goes on behind this event; from `unreported`, at the same step, it comes once more.
    """

    row: dict[str, float]
    progress: Progress
    unreported: Progress
    sample_due: bool = False
    checkpoint_due: bool = False


def scored_positions(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, C) stream and (N,) ids of a batch's N targets; the head is not asked about any other position."""
    hidden = model.hidden(batch.inputs, batch.positions, batch.documents)  # (B, T, C)
    return hidden.flatten(0, 1).index_select(0, batch.scored), batch.targets.flatten()[batch.scored]


def batch_loss(model: GPT, batch: Batch) -> Tensor:
    """Sum of the losses of a batch's targets."""
    hidden, targets = scored_positions(model, batch)
    return summed_loss(hidden, model.head, targets)


def train_step(
    model: GPT,
    optimizer: optim.Optimizer,
    micro_batches: list[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    grad_clip: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    loss_scale: float = 1.0,
) -> tuple[float, float] | None:
    """One optimizer step: forward and backward for each micro-batch, clip, step. Returns loss and gradient norm.

    When either is not finite, the weights are left as they were. `stop` is asked before each micro-batch; once it
    says true, the step is given up and None returned. Gradients are computed `loss_scale` times too large, so that
    small ones do not vanish in float16, and divided by it before they are used.
    """
    n_targets = sum(batch.n_targets for batch in micro_batches)
    total = torch.zeros((), device=device)
    with autocast(device, dtype):  # around all micro-batches: each weight that is trained is converted once
        for batch in micro_batches:
            if stop():
                optimizer.zero_grad(set_to_none=True)
                return None
            part = batch_loss(model, batch.to(device)) / n_targets
            with torch.autocast(device.type, enabled=False):
                (part * loss_scale).backward()
            total += part.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if loss_scale != 1.0:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    mean_loss, grad_norm = torch.stack([total, norm]).tolist()  # the one place where a GPU is waited for
    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        if grad_clip is not None and grad_norm > grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; float32 leaves everything as it is."""
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype if low else None, enabled=low)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    bytes_per_token: Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss per target in nats, its perplexity and, with the (V,) length of each token, bits per byte of text.

    Targets without bytes (the end of a text) count in the loss but not in the bits per byte. None when `stop`, which
    is asked before each batch, says true.
    """
    loss_sum, n_targets, nats, n_bytes = 0.0, 0, 0.0, 0
    with eval_mode(model):
        for batch in batches:
            if stop():
                return None
            with autocast(device, dtype):
                hidden, targets = scored_positions(model, batch.to(device))
                losses = token_losses(hidden, model.head, targets)
            loss_sum += losses.sum(dtype=torch.float64 if device.type != "mps" else None).item()
            n_targets += len(targets)
            if bytes_per_token is not None:
                lengths = bytes_per_token[targets]
                nats += losses[lengths > 0].sum().item()
                n_bytes += int(lengths.sum())
    loss = loss_sum / n_targets
    # e^709 is the largest float; NaN stays NaN
    metrics = {"val/loss": loss, "val/perplexity": math.exp(loss if not loss > 700 else 700.0)}
    if n_bytes:
        metrics["val/bpb"] = nats / math.log(2) / n_bytes
    return metrics


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
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Trains from `progress` to `total_steps`, or until `cfg.patience` evaluations brought nothing better.

    Yields before the first step, after each step at which something is due, and when `stop` says true, which is asked
    before each micro-batch and each batch of an evaluation: then once more and without a row, as the end. Raises
    UserError (4), with the weights as they were before, when a loss or a gradient is not finite, also of an evaluation.
    """
    model.train()
    ahead = ReadAhead(batches.step, device)
    seconds, tokens_before = 0.0, progress.tokens  # since the last logged step, training only
    while True:
        step = progress.step
        if progress.reported < step:
            due = due_at(step, cfg, total_steps)
            reported = replace(progress, reported=step)
            row: dict[str, float] = {"step": step, "tokens": progress.tokens}
            if step > 0:
                lr = optimizer.param_groups[0]["peak_lr"] * optim.lr_factor(schedule, step - 1, total_steps)
                row |= {"lr": lr, "grad_norm": progress.grad_norm}
            if progress.skipped:
                row["skipped"] = progress.skipped
            if due.log:
                if progress.loss_targets:
                    row["train/loss"] = progress.loss_sum / progress.loss_targets
                if seconds:  # none have passed when the run was stopped here and has just been resumed
                    row["tokens_per_second"] = (progress.tokens - tokens_before) / seconds
                row["memory_gb"] = memory_gb(device)
                reported = replace(reported, loss_sum=0.0, loss_targets=0)
                seconds, tokens_before = 0.0, progress.tokens
            if due.evaluation:
                metrics = evaluate(model, val_batches, device, dtype, bytes_per_token, stop)
                if metrics is None:
                    yield Event({}, progress, progress)
                    return
                row |= metrics
                if not math.isfinite(metrics["val/loss"]):
                    yield Event(row, progress, progress)
                    raise stopped(step, f"val/loss {metrics['val/loss']}", row.get("lr", 0.0))
                reported = scored(reported, metrics["val/loss"])
                is_best = step > 0 and reported.best_step == step
                is_end = is_finished(reported, cfg, total_steps)
                due = due._replace(
                    sample=due.sample or (is_end and cfg.sample_every is not None),
                    checkpoint=due.checkpoint or is_best or is_end,
                )
            if any(due) or not math.isfinite(progress.grad_norm):
                yield Event(row, reported, progress, due.sample, due.checkpoint)
            progress = reported
        if is_finished(progress, cfg, total_steps):
            return

        started = time.perf_counter()
        optim.set_lr(optimizer, optim.lr_factor(schedule, step, total_steps))
        place = 0 if cfg.one_batch else step
        micro_batches = ahead.step(place)
        following = None if step + 1 == total_steps else 0 if cfg.one_batch else step + 1
        # Dropout draws from the global generator: with a seed of its own for each step, whatever else draws from it
        # in between (samples, evaluation) changes nothing, and a resumed run draws the same.
        step_seed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
        scale = progress.loss_scale if dtype == torch.float16 else 1.0
        while True:
            torch.manual_seed(step_seed)
            with ahead.preparing(following):
                result = train_step(model, optimizer, micro_batches, device, dtype, cfg.grad_clip, stop, scale)
            if result is None or not is_overflow(*result) or scale == 1.0:
                break
            scale /= 2  # the scaled gradients were too large for float16: the step is taken again with smaller ones
        seconds += time.perf_counter() - started
        if result is None:
            yield Event({}, progress, progress)
            return
        loss, grad_norm = result
        n_tokens = sum(batch.n_tokens for batch in micro_batches)
        n_targets = sum(batch.n_targets for batch in micro_batches)
        after = replace(progress, step=step + 1, tokens=progress.tokens + n_tokens)
        if dtype == torch.float16:
            after = rescaled(after, scale)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            loss_sum = progress.loss_sum + loss * n_targets
            loss_targets = progress.loss_targets + n_targets
            progress = replace(after, grad_norm=grad_norm, loss_sum=loss_sum, loss_targets=loss_targets)
            continue
        lr = optimizer.param_groups[0]["lr"]
        error = stopped(step + 1, f"loss {loss}, gradient norm {grad_norm}", lr, batches.documents(place))
        if progress.skipped == cfg.max_skipped:
            row = {"step": step + 1, "tokens": after.tokens, "lr": lr, "grad_norm": grad_norm, "train/loss": loss}
            yield Event(row, progress, progress)
            raise error
        # Not a finite gradient norm either, so that the step is reported whether or not anything else is due.
        progress = replace(after, skipped=progress.skipped + 1, grad_norm=math.nan)
        log.warning(f"step {step + 1}: loss {loss}, gradient norm {grad_norm} ({error.where}); update left out")


def is_overflow(loss: float, grad_norm: float) -> bool:
    """Whether it was the gradients that left the range of their type, not the loss."""
    return math.isfinite(loss) and not math.isfinite(grad_norm)


def stopped(step: int, what: str, lr: float, documents: Sequence[int] = ()) -> UserError:
    """The error for a step whose loss or gradient is not finite."""
    where = f"learning rate {lr:.3g}"
    if documents:
        more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
        where += f", documents {', '.join(map(str, documents[:8]))}{more} of the training split"
    remedy = "lower optimizer.lr, set train.grad_clip, or allow some such steps with train.max_skipped"
    return UserError(f"training stopped at step {step}: {what}", where, remedy, NUMERICAL)


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
        print(escape(token_ids_to_text(ids, tokenizer).replace("\n", " ")))
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
