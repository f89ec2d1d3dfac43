"""Computes how long a run is, how far it has come, what is due at a step, and whether it is over."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpt.config.schema import TrainSection

SCALE_GROWS_AFTER = 2000  # steps, as in torch's GradScaler


@dataclass(frozen=True)
class Progress:
    """How far a run is: all of the loop's state between two steps, besides model and optimizer."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # tokens read, padding not counted
    reported: int = -1  # the last step that was evaluated and logged as far as it was due
    best: float = math.inf  # lowest validation loss
    best_step: int = 0
    stale: int = 0  # evaluations since best_step
    skipped: int = 0  # updates left out because loss or gradient was not finite
    grad_norm: float = 0.0  # of the last step
    loss_sum: float = 0.0  # of the targets since the last logged step ...
    loss_targets: int = 0  # ... and their number
    loss_scale: float = 2.0**16  # multiplies the loss in float16, so that gradients do not vanish; not used otherwise
    steady: int = 0  # steps since loss_scale was changed


class Due(NamedTuple):
    """What is due at a step."""

    log: bool
    evaluation: bool
    sample: bool
    checkpoint: bool


def budget(
    max_steps: int | None, epoch_steps: int | None, max_tokens: int | None, tokens_per_step: float
) -> tuple[int, str] | None:
    """The length of a run in optimizer steps and the key that decides it, or None when nothing limits the run.

    `epoch_steps` are those of train.max_epochs epochs. Tokens count when neither steps nor epochs are given.
    """
    limits = [(max_steps, "train.max_steps"), (epoch_steps, "train.max_epochs")]
    if max_steps is None and epoch_steps is None and max_tokens is not None:
        limits.append((max(1, round(max_tokens / tokens_per_step)), "train.max_tokens"))
    return min(((steps, key) for steps, key in limits if steps is not None), default=None)


def due_at(step: int, cfg: TrainSection, total_steps: int) -> Due:
    """What is due after `step` steps, whatever happens; before the first one, an evaluation."""
    if step == 0:
        return Due(log=False, evaluation=True, sample=False, checkpoint=False)
    every = (cfg.log_every, cfg.eval_every, cfg.sample_every, cfg.save_every)
    due = Due(*(n is not None and (step == total_steps or step % n == 0) for n in every))
    # The mean loss of a few steps beside those of many would be a spike at the end of the curve.
    is_rest = step > cfg.log_every and 0 < 2 * (step % cfg.log_every) < cfg.log_every
    return due._replace(log=due.log and not is_rest)


def due_after_evaluation(due: Due, scored: Progress, cfg: TrainSection, total_steps: int) -> Due:
    """What an evaluation adds to what is due: the best and the last model are saved, and the last one is sampled."""
    is_best = scored.step > 0 and scored.best_step == scored.step
    is_end = is_finished(scored, cfg, total_steps)
    return due._replace(
        sample=due.sample or (is_end and cfg.sample_every is not None),
        checkpoint=due.checkpoint or is_best or is_end,
    )


def scored(progress: Progress, loss: float) -> Progress:
    """The progress after an evaluation with this validation loss: its best step, or one more that was not better.

    The first weights are the best only until others have been evaluated: no checkpoint has them."""
    if loss < progress.best or progress.best_step == 0:
        return replace(progress, best=loss, best_step=progress.step, stale=0)
    return replace(progress, stale=progress.stale + 1)


def rescaled(progress: Progress, scale: float) -> Progress:
    """The loss scale after a step that needed `scale`: that, or twice as much after 2,000 steady steps.

    Dynamic loss scaling (Micikevicius et al., 2018, "Mixed Precision Training", section 3.2), without losing a step.
    """
    if scale != progress.loss_scale:
        return replace(progress, loss_scale=scale, steady=0)
    if progress.steady + 1 == SCALE_GROWS_AFTER:
        return replace(progress, loss_scale=2 * scale, steady=0)
    return replace(progress, steady=progress.steady + 1)


def is_finished(progress: Progress, cfg: TrainSection, total_steps: int) -> bool:
    """Whether a run has come to its end: all steps taken, or `cfg.patience` evaluations without a better one."""
    at_end = progress.step >= total_steps or (cfg.patience is not None and progress.stale >= cfg.patience)
    return at_end and progress.reported == progress.step


def describe_end(progress: Progress, cfg: TrainSection, total_steps: int, budget_key: str) -> str:
    """Where a run is that has come to its end, and what trains it longer. `budget_key` is the one that decides the
    length, see `budget`."""
    name = budget_key.removeprefix("train.")
    if progress.step > total_steps:
        where = f"already at step {progress.step}: {budget_key}={getattr(cfg, name)} is less"
    elif progress.step < total_steps:
        return f"already at step {progress.step}, where train.patience={cfg.patience} ended it; a larger one goes on"
    else:
        where = f"already at step {progress.step} of {total_steps}"
    doubled = max(2 * getattr(cfg, name), math.ceil(2 * getattr(cfg, name) * progress.step / total_steps))
    return f"{where}; to train longer, type more, such as {budget_key}={doubled}"
