"""Trains a model. `fit` yields an event after each step at which something is due; its caller logs, samples and saves.

Losses are weighted by tokens everywhere: the loss of a step is the mean over all its targets, however they are spread
over rows and micro-batches, and the validation loss is the mean over all validation targets.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gpt import optim
from gpt.config.schema import MEAN_METRIC, METRIC, TrainConfig
from gpt.data.batching import Batch, Batches
from gpt.data.read_ahead import ReadAhead
from gpt.errors import NUMERICAL, UserError
from gpt.machine.device import memory_gb
from gpt.machine.machine import Machine
from gpt.machine.ranks import COUNTS, Shared
from gpt.model import LanguageModel
from gpt.objective import Objective
from gpt.optimizers.running_mean import in_place
from gpt.progress import Due, Progress, due_after_evaluation, due_at, is_finished, rescaled, scored
from gpt.sampling import eval_mode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What `fit` yields: a row of metrics, and what is due now, while model and optimizer are consistent.

    A run that is resumed from `progress` continues after this event; one from `unreported`, at the same step, yields it
    again. Without a row it comes before an evaluation, so that a checkpoint which is due need not wait for that.
    """

    row: dict[str, float]
    progress: Progress
    unreported: Progress
    sample_due: bool = False
    checkpoint_due: bool = False

    @property
    def best(self) -> float | None:
        """The validation loss, if this step has the lowest so far."""
        return self.progress.best if self.row and self.progress.best_step == self.progress.step else None


class Stopped(Exception):
    """`stop` has returned true; the step or the evaluation is abandoned."""


def train_step(
    model: LanguageModel,
    optimizer: optim.Optimizer,
    objective: Objective,
    micro_batches: list[Batch],
    machine: Machine,
    grad_clip: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    loss_scale: float = 1.0,
    n_targets: float | None = None,
) -> tuple[float, float]:
    """One optimizer step: forward and backward for each micro-batch, clip, step. Returns loss and gradient norm.

    `micro_batches` are those of this rank, and `n_targets` counts the targets of all ranks, None: there is one rank.
    When either is not finite, the weights stay as they were. `stop` is called before each micro-batch; once it returns
    true, Stopped is raised and nothing has changed. The loss is multiplied by `loss_scale`, so that small gradients do
    not vanish in float16, and the gradients are divided by it before they are used.
    """
    ranks, n_targets = machine.ranks, n_targets or sum(batch.n_targets for batch in micro_batches)
    total = torch.zeros((), device=machine.device)
    try:
        with ranks.computing(model), machine.autocast():  # one for all micro-batches: each weight is converted once
            for batch in unless(stop, ranks.each(micro_batches), machine):
                loss_sum, _ = objective.loss(model, batch)
                loss = loss_sum / n_targets
                with torch.autocast(machine.device.type, enabled=False):
                    (loss * loss_scale).backward()
                total += loss.detach()
        gradients = ranks.gradients(total, model.parameters())
        if loss_scale != 1.0:
            torch._foreach_mul_(gradients, 1 / loss_scale)
        norm = ranks.norm(gradients)
        mean_loss, grad_norm = torch.stack([total, norm]).tolist()  # the only wait for the GPU in a step
        if math.isfinite(mean_loss) and math.isfinite(grad_norm):
            if grad_clip is not None and grad_norm > grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def unless(stop: Callable[[], bool], batches: Iterable[Batch], machine: Machine) -> Iterator[Batch]:
    """The batches, on the machine's device. Raises Stopped as soon as `stop`, called before each, returns true."""
    for batch in batches:
        if stop():
            raise Stopped
        yield batch.to(machine.device)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    objective: Objective,
    batches: Sequence[Batch],
    machine: Machine,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The objective's metrics of a model, without dropout. Raises Stopped when `stop` returns true before a batch."""
    shared = Shared(batches, machine.ranks, lambda some: unless(stop, some, machine))
    with eval_mode(model), machine.ranks.computing(model), machine.autocast():
        return objective.evaluate(model, shared)


def fit(
    model: LanguageModel,
    optimizer: optim.Optimizer,
    objective: Objective,
    batches: Batches,
    cfg: TrainConfig,
    machine: Machine,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Trains from `progress` to the last step, or until `train.patience` evaluations brought nothing better.

    Yields before the first step and after each step at which something is due. `stop` is called before each micro-batch
    and each batch of an evaluation; once it returns true, a last event without a row follows. Raises UserError (4),
    with the weights as they were before the step, when a loss, also of an evaluation, or a gradient is not finite.
    """
    model.train()
    ahead, ranks = ReadAhead(batches.train.step, machine.device), machine.ranks
    total_steps, clock = batches.total_steps, Clock(progress.tokens)
    try:
        while True:
            step = progress.step
            if progress.reported < step:
                due = due_at(step, cfg.train, total_steps)
                row, reported = report(progress, due, optimizer, cfg, total_steps, clock, machine)
                if due.evaluation:
                    if due.checkpoint or step == total_steps:
                        yield Event({}, progress, progress, checkpoint_due=True)
                    row |= evaluate(model, objective, batches.validation, machine, stop)
                    if mean := optim.parts(optimizer).get("ema"):
                        with in_place(mean):
                            averaged = evaluate(model, objective, batches.validation, machine, stop)
                        row[MEAN_METRIC] = averaged[METRIC]
                    if not math.isfinite(row[METRIC]):
                        yield Event(row, progress, progress)
                        raise not_finite(step, f"{METRIC} {row[METRIC]}", row.get("lr", 0.0))
                    reported = scored(reported, row[METRIC])
                    due = due_after_evaluation(due, reported, cfg.train, total_steps)
                if any(due) or not math.isfinite(progress.grad_norm):
                    yield Event(row, reported, progress, due.sample, due.checkpoint)
                progress = reported
            if is_finished(progress, cfg.train, total_steps):
                return

            started = time.perf_counter()
            optim.set_lr(optimizer, optim.lr_factor(cfg.schedule, step, total_steps))
            model.training_window = optim.training_window(cfg.schedule, model.window, step, total_steps)
            place = 0 if cfg.train.one_batch else step
            micro_batches = ahead.step(place)
            own = [sum(batch.n_tokens for batch in micro_batches), sum(batch.n_targets for batch in micro_batches)]
            n_tokens, n_targets = ranks.total(own, COUNTS)
            if ranks.stops:
                raise Stopped
            following = None if step + 1 == total_steps else 0 if cfg.train.one_batch else step + 1
            # Dropout draws from the global generator. Each step seeds it, so that whatever else draws from it between
            # steps (samples, evaluation) changes nothing, and a resumed run draws the same.
            step_seed = int(np.random.SeedSequence([cfg.seed, step, *ranks.seed]).generate_state(1, np.uint64)[0])
            scale = progress.loss_scale if machine.dtype == torch.float16 else 1.0
            while True:
                torch.manual_seed(step_seed)
                with ahead.preparing(following):
                    loss, grad_norm = train_step(
                        model, optimizer, objective, micro_batches, machine, cfg.train.grad_clip, stop, scale, n_targets
                    )
                if scale == 1.0 or not math.isfinite(loss) or math.isfinite(grad_norm):
                    break
                scale /= 2  # the gradients were too large for float16: the step is taken again with smaller ones
            clock.seconds += time.perf_counter() - started

            after = replace(progress, step=step + 1, tokens=progress.tokens + n_tokens)
            if machine.dtype == torch.float16:
                after = rescaled(after, scale)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                loss_sum, loss_targets = progress.loss_sum + loss * n_targets, progress.loss_targets + n_targets
                progress = replace(after, grad_norm=grad_norm, loss_sum=loss_sum, loss_targets=loss_targets)
                continue
            lr = optimizer.param_groups[0]["lr"]
            error = not_finite(step + 1, f"loss {loss}, gradient norm {grad_norm}", lr, batches.train.documents(place))
            if progress.skipped == cfg.train.max_skipped:
                row = {"step": step + 1, "tokens": after.tokens, "lr": lr, "grad_norm": grad_norm, "train/loss": loss}
                yield Event(row, progress, progress)
                raise error
            # The gradient norm becomes NaN, so that the step is reported even if nothing else is due.
            progress = replace(after, skipped=progress.skipped + 1, grad_norm=math.nan)
            log.warning(f"step {step + 1}: loss {loss}, gradient norm {grad_norm} ({error.where}); update left out")
    except Stopped:
        yield Event({}, progress, progress)


@dataclass
class Clock:
    """The time spent in training steps since the last logged row, and the tokens that had been read by then."""

    tokens: int
    seconds: float = 0.0


def report(
    progress: Progress, due: Due, optimizer: optim.Optimizer, cfg: TrainConfig, total_steps: int, clock: Clock,
    machine: Machine,
) -> tuple[dict[str, float], Progress]:  # fmt: skip
    """The row of metrics of a step, without those of an evaluation, and the progress once it is reported."""
    row: dict[str, float] = {"step": progress.step, "tokens": progress.tokens}
    reported = replace(progress, reported=progress.step)
    if progress.step > 0:
        lr = optimizer.param_groups[0]["peak_lr"] * optim.lr_factor(cfg.schedule, progress.step - 1, total_steps)
        row |= {"lr": lr, "grad_norm": progress.grad_norm}
    if progress.skipped:
        row["skipped"] = progress.skipped
    if due.log:
        if progress.loss_targets:
            row["train/loss"] = progress.loss_sum / progress.loss_targets
        if clock.seconds:  # 0 when the run was stopped here and has just been resumed
            row["tokens_per_second"] = (progress.tokens - clock.tokens) / clock.seconds
        row["memory_gb"] = memory_gb(machine.device)
        reported = replace(reported, loss_sum=0.0, loss_targets=0)
        clock.seconds, clock.tokens = 0.0, progress.tokens
    return row, reported


def not_finite(step: int, what: str, lr: float, documents: Sequence[int] = ()) -> UserError:
    """The error for a step whose loss or gradient is not finite."""
    where = f"learning rate {lr:.3g}"
    if documents:
        more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
        where += f", documents {', '.join(map(str, documents[:8]))}{more} of the training split"
    remedy = "lower optimizer.lr, set train.grad_clip, or allow some such steps with train.max_skipped"
    return UserError(f"training stopped at step {step}: {what}", where, remedy, NUMERICAL)
