"""Predicts the learning rate of the lowest val/loss from the jobs of a sweep, and where to look next.

For each combination of the other varied settings, val/loss of the completed jobs is fitted as a parabola in log10 of
the learning rate. Around its best value that is what any smooth curve looks like; over many decades it is not, which
the checks on left-out jobs show.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt.sweeps.jobs import Job, as_text, grouped, is_number, varied_keys
from gpt.sweeps.leaderboard import is_result, t_quantile
from gpt.terminal.console import escape

LR = "optimizer.lr"


@dataclass(frozen=True)
class Prediction:
    """For one combination of the other varied settings. An interval that the jobs do not give is None."""

    settings: dict[str, Any]  # the other varied keys, without "seed"
    tried: list[float]  # the different learning rates, ascending
    jobs: int
    sentence: str  # where to look next
    lr: float | None = None  # at the lowest point of the parabola; None if it has none, or too far from what was tried
    low: float | None = None  # 95 % interval of that learning rate
    high: float | None = None
    loss: float | None = None  # val/loss there
    loss_low: float | None = None  # 95 % interval of the mean val/loss of jobs there
    loss_high: float | None = None
    inside: int = 0  # left-out jobs whose val/loss was in the 95 % prediction interval of the others ...
    held_out: int = 0  # ... of so many
    margin: float | None = None  # half of that interval, the median over the left-out jobs
    nearest: int = 0  # left-out learning rates without which the prediction was nearest to the best one tried ...
    left_out: int = 0  # ... of so many

    def __str__(self) -> str:
        where = " ".join(f"{escape(key)}={as_text(value)}" for key, value in self.settings.items())
        best = f"no best {LR} can be predicted"
        if self.lr is not None:
            best = f"best {LR} {_short(self.lr)}"
            if self.low is not None:
                best += f" (95 % interval {_short(self.low)} to {_short(self.high)})"
            best += f", val/loss {self.loss:.4f} there"
            if self.loss_low is not None:
                best += f" ({self.loss_low:.4f} to {self.loss_high:.4f})"
        text = f"{where}: {best}" if where else best
        return f"{text}, from {self.jobs} jobs. {self.sentence} {self._checks()}"

    def _checks(self) -> str:
        if not self.held_out and not self.left_out:
            return "Too few jobs to check it on left-out ones."
        checks = []
        if self.held_out:
            checks.append(
                f"{self.inside} of {self.held_out} held-out jobs inside the 95 % interval that the others predict "
                f"(+- {self.margin:.4f} at the median)"
            )
        if self.left_out:
            checks.append(
                f"one lr left out at a time, {self.nearest} of {self.left_out} predictions nearest to the best lr tried"
            )
        return f"Checked: {'; '.join(checks)}."


@dataclass(frozen=True, eq=False)
class Parabola:
    """loss = a + b z + c z^2 with z = log10(lr) - middle, fitted by least squares to n jobs.

    The errors are taken as independent, normal and of one size. With X the rows (1, z, z^2) of the jobs, the
    covariance of (a, b, c) is s^2 (X'X)^-1. What all jobs of one seed have in common counts as error.
    """

    middle: float  # mean of log10(lr): around it, X'X is well conditioned
    coefficients: np.ndarray  # (3,) a, b, c
    inverse: np.ndarray  # (3, 3) (X'X)^-1
    dof: int  # n - 3, degrees of freedom of the residuals
    s: float | None  # standard deviation of a job around the curve; None without degrees of freedom

    def at(self, lr: float) -> float:
        """The loss of the curve."""
        return float(self._row(lr) @ self.coefficients)

    def interval(self, lr: float, of_a_job: bool = False) -> tuple[float, float] | None:
        """95 % interval of the curve at `lr`, or of one more job there. None without degrees of freedom.

        a + b z + c z^2 +- t s sqrt(x'(X'X)^-1 x), x = (1, z, z^2); for one more job with 1 added under the root.
        """
        if self.s is None:
            return None
        x = self._row(lr)
        half = t_quantile(self.dof) * self.s * math.sqrt(float(x @ self.inverse @ x) + of_a_job)
        return self.at(lr) - half, self.at(lr) + half

    def minimum(self) -> float | None:
        """log10 of the learning rate at the lowest point, -b / 2c; None where the parabola does not open upward."""
        a, b, c = self.coefficients.tolist()
        rounding = 1e-12 * abs(a) * math.sqrt(self.inverse[2, 2])  # in c, from losses of 64 bits
        if c <= rounding:
            return None
        return self.middle - b / (2 * c)

    def minimum_interval(self) -> tuple[float, float] | None:
        """95 % interval of the lowest point's log10(lr); None where the jobs do not bound it on both sides.

        Of all z, those at which a slope b + 2cz = 0 is not rejected: (b + 2cz)^2 <= t^2 Var(b + 2cz). Its coverage is
        exact, where the delta method's relies on c being known well. E. C. Fieller, "Some problems in interval
        estimation", Journal of the Royal Statistical Society B 16 (1954).
        """
        if self.s is None or self.minimum() is None:
            return None
        _, b, c = self.coefficients.tolist()
        T = (t_quantile(self.dof) * self.s) ** 2
        V = self.inverse
        # Var(b + 2cz) = s^2 (Vbb + 4z Vbc + 4z^2 Vcc), hence p z^2 + q z + r <= 0 with
        p = 4 * (c * c - T * float(V[2, 2]))
        q = 4 * (b * c - T * float(V[1, 2]))
        r = b * b - T * float(V[1, 1])
        if p <= 0:  # c itself may be 0: the slope might be the same everywhere
            return None
        root = math.sqrt(max(q * q - 4 * p * r, 0.0))  # below 0 by rounding only: z = -b / 2c is a solution
        low, high = self.middle + (-q - root) / (2 * p), self.middle + (-q + root) / (2 * p)
        return (low, high) if low > -300 and high < 300 else None  # as learning rates they are floats

    def lowest(self, tried: Sequence[float]) -> float:
        """The learning rate with the lowest loss on the curve between the lowest and the highest of `tried`."""
        low, high = min(tried), max(tried)
        x = self.minimum()
        if x is not None and math.log10(low) <= x <= math.log10(high):
            return 10**x
        return min(low, high, key=self.at)

    def _row(self, lr: float) -> np.ndarray:
        z = math.log10(lr) - self.middle
        return np.array([1.0, z, z * z])


def fit(lrs: Sequence[float], losses: Sequence[float]) -> Parabola:
    """The parabola of the least squares. Needs 3 different learning rates."""
    x = np.log10(lrs)
    middle = float(x.mean())
    z = x - middle
    X = np.stack([np.ones_like(z), z, z * z], axis=1)  # (n, 3)
    y = np.asarray(losses, dtype=float)
    coefficients = np.linalg.lstsq(X, y)[0]
    residuals = y - X @ coefficients
    dof = len(y) - 3
    s = math.sqrt(residuals @ residuals / dof) if dof else None
    return Parabola(middle, coefficients, np.linalg.inv(X.T @ X), dof, s)


def predictions(jobs: Sequence[Job]) -> list[Prediction]:
    """One for each combination of the other varied settings that has completed jobs at 3 learning rates or more."""
    keys = varied_keys(jobs)
    if LR not in keys:
        return []
    others = [key for key in keys if key not in (LR, "seed")]
    usable = [job for job in jobs if is_result(job) and is_number(lr := job.setting(LR)) and 0 < lr < math.inf]
    predicted = []
    for group in grouped(usable, others):
        lrs, losses = [job.setting(LR) for job in group], [job.val_loss for job in group]
        if _make_a_parabola(lrs):
            predicted.append(_predict({key: group[0].setting(key) for key in others}, lrs, losses))
    return predicted


def held_out(predictions: Sequence[Prediction]) -> str | None:
    """How often all predictions together were right on what was left out; None where nothing could be."""
    jobs, rates = sum(p.held_out for p in predictions), sum(p.left_out for p in predictions)
    if not jobs and not rates:
        return None
    inside, nearest = sum(p.inside for p in predictions), sum(p.nearest for p in predictions)
    parts = [f"{inside} of {jobs} held-out jobs were inside their 95 % interval"] if jobs else []
    parts += [f"{nearest} of {rates} predictions without one lr were nearest to the best lr tried"] if rates else []
    return "In all, " + "; ".join(parts) + "."


def _predict(settings: dict[str, Any], lrs: list[float], losses: list[float]) -> Prediction:
    tried = sorted(set(lrs))
    curve = fit(lrs, losses)
    best = _best_tried(lrs, losses)
    return Prediction(
        settings,
        tried,
        len(lrs),
        _where_next(curve, tried, best),
        **_lowest_point(curve, tried),
        **_leave_jobs_out(lrs, losses),
        **_leave_rates_out(lrs, losses, tried, best),
    )


def _lowest_point(curve: Parabola, tried: list[float]) -> dict[str, float]:
    """The predicted learning rate and loss with their intervals, as far as they are known."""
    x = curve.minimum()
    first, last = math.log10(tried[0]), math.log10(tried[-1])
    if x is None or not 2 * first - last <= x <= 2 * last - first:  # farther away than the whole range is wide
        return {}
    point = {"lr": 10**x, "loss": curve.at(10**x)}
    if bounds := curve.minimum_interval():
        point |= {"low": 10 ** bounds[0], "high": 10 ** bounds[1]}
    # The slope is 0 there, so that an error of x changes the loss in second order only: the delta method's interval
    # of the lowest loss is that of the curve.
    if heights := curve.interval(10**x):
        point |= {"loss_low": heights[0], "loss_high": heights[1]}
    return point


def _where_next(curve: Parabola, tried: list[float], best: float) -> str:
    """What to try next, and what speaks against trusting it. `best`: the learning rate that did best."""
    x = curve.minimum()
    if x is None:
        return f"The parabola does not open upward, so it has no lowest point: {_beyond(tried, best)}."
    below, above = [lr for lr in tried if math.log10(lr) <= x], [lr for lr in tried if math.log10(lr) >= x]
    if not below or not above:
        edge = tried[-1] if below else tried[0]
        where = f"outside the rates tried, {as_text(tried[0])} to {as_text(tried[-1])}, an extrapolation"
        contradiction = "" if best == edge else f"; yet the best one tried is {as_text(best)}, so more seeds first"
        return f"The lowest point is {where}: {_beyond(tried, edge)}{contradiction}."
    low, high = below[-1], above[0]
    near = min(low, high, key=curve.at)
    gain = curve.at(near) - curve.at(10**x)
    place = f"between {as_text(low)} and {as_text(high)}"
    if best not in (low, high):
        sentence = (
            f"It is {place}, but the best one tried is {as_text(best)}: over so wide a range the losses are no "
            "parabola, or they are noisy; look at rates around both next"
        )
    elif abs(x - math.log10(near)) < 0.02:  # within 5 %
        sentence = f"It has been tried already, with {as_text(near)}"
    elif curve.s is not None and gain < curve.s:
        sentence = (
            f"Little to gain {place}: at {as_text(near)} the curve is {gain:.4f} higher, less than what single jobs "
            f"differ by ({curve.s:.4f})"
        )
    else:
        sentence = f"Look at {_short(10**x)} next, {place}"
    if curve.s is None:
        return f"{sentence}. No more jobs than a parabola has parameters: nothing is known of the uncertainty."
    if curve.minimum_interval() is None:
        return f"{sentence}. That there is a lowest point at all may be chance: more seeds or a wider range first."
    return f"{sentence}."


def _beyond(tried: list[float], best: float) -> str:
    if best == tried[-1]:
        return f"look at {as_text(best)} and above next"
    if best == tried[0]:
        return f"look at {as_text(best)} and below next"
    return f"the best one tried, {as_text(best)}, may be so by chance; more seeds first"


def _leave_jobs_out(lrs: list[float], losses: list[float]) -> dict[str, Any]:
    """How many jobs have a val/loss inside the 95 % interval for one more job that the others give."""
    inside, margins = 0, []
    for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True)):
        rest = lrs[:i] + lrs[i + 1 :]
        if not _make_a_parabola(rest) or len(rest) < 4:  # with 3 there is no uncertainty
            continue
        low, high = fit(rest, losses[:i] + losses[i + 1 :]).interval(lr, of_a_job=True)
        inside += low <= loss <= high
        margins.append((high - low) / 2)
    margin = statistics.median(margins) if margins else None
    return {"inside": inside, "held_out": len(margins), "margin": margin}


def _leave_rates_out(lrs: list[float], losses: list[float], tried: list[float], best: float) -> dict[str, int]:
    """How often the curve without one learning rate is lowest nearest to the one tried that is truly best."""
    nearest = left_out = 0
    for left_out_lr in tried:
        rest = [(lr, loss) for lr, loss in zip(lrs, losses, strict=True) if lr != left_out_lr]
        if _make_a_parabola([lr for lr, _ in rest]):
            lowest = math.log10(fit(*zip(*rest, strict=True)).lowest(tried))
            nearest += min(tried, key=lambda lr: abs(math.log10(lr) - lowest)) == best
            left_out += 1
    return {"nearest": nearest, "left_out": left_out}


def _best_tried(lrs: list[float], losses: list[float]) -> float:
    """The learning rate with the lowest mean of its losses."""
    losses_of: dict[float, list[float]] = {}
    for lr, loss in sorted(zip(lrs, losses, strict=True)):
        losses_of.setdefault(lr, []).append(loss)
    return min(losses_of, key=lambda lr: statistics.fmean(losses_of[lr]))


def _make_a_parabola(lrs: list[float]) -> bool:
    """Whether there are 3 different ones; what agrees in 6 digits is one, or rounding would be most of the curve."""
    return len({round(math.log10(lr), 6) for lr in lrs}) >= 3


def _short(lr: float) -> str:
    """0.00081, 8.1e-05"""
    return f"{lr:.2g}"
