"""Chooses the jobs that go on in successive halving: all get a small budget, the best a larger one, and so on.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016, algorithm 1,
over the jobs of a sweep: a rung is a budget in tokens, and `keep` the part of the jobs that goes beyond it. What a job
has learned it keeps: it pauses at a rung and goes on from its checkpoint.
"""

import math
from collections.abc import Sequence

from gpt.config.schema import METRIC
from gpt.sweeps.jobs import Job, grouped, varied_keys


def loss_at(job: Job, rung: int) -> float | None:
    """val/loss of the first evaluation with at least `rung` tokens; None if the job has not come so far."""
    reached = (row[METRIC] for row in job.rows if METRIC in row and row.get("tokens", 0) >= rung)
    return next(reached, None)


def survivors(jobs: Sequence[Job], rung: int, keep: float) -> list[Job]:
    """The jobs that go beyond a rung, in their order: the best ceil(keep * n) of the n settings that came so far.

    Jobs that differ in nothing but the seed are one setting, with the mean of their losses; they go on together.
    """
    keys = [key for key in varied_keys(jobs) if key != "seed"]
    settings = grouped([job for job in jobs if loss_at(job, rung) is not None], keys)
    ranked = sorted(settings, key=lambda group: _mean([loss_at(job, rung) for job in group]))
    n_kept = math.ceil(round(keep * len(ranked), 6))  # 0.07 * 100 is a little more than 7
    kept = {job.id for group in ranked[:n_kept] for job in group}
    return [job for job in jobs if job.id in kept]


def _mean(losses: list[float]) -> float:
    mean = sum(losses) / len(losses)
    return math.inf if math.isnan(mean) else mean
