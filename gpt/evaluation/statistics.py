"""Says how certain a figure is: intervals by the bootstrap over questions, comparisons in pairs, McNemar's test."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8  # with which the number of questions that is named would show a difference
MIN_QUESTIONS = 2  # of one alone nothing is known about others
FEW = 30  # questions: of fewer, an interval of the bootstrap holds the truth less often than it says
MIN_MODELS = 5  # of fewer, not even a perfect rank correlation is more than chance: of 4, its p is 2 / 4! = 0.083


@dataclass(frozen=True)
class Measure:
    """A figure over questions. `parts`: (n, k), what each question adds to sums; `value`: (..., k) sums -> (...)."""

    parts: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    is_binary: bool = False  # each question is right or wrong

    def take(self, questions: Sequence[int]) -> "Measure":
        """Over some of the questions."""
        return Measure(self.parts[list(questions)], self.value, self.is_binary)

    def where(self, kept: np.ndarray) -> "Measure":
        """Over the questions where `kept` (n,) is true, in resamples of all of them. NaN where there is none."""

        def value(sums: np.ndarray) -> np.ndarray:
            return np.where(sums[..., -1] > 0, self.value(sums[..., :-1]), np.nan)

        parts = np.concatenate([self.parts, np.ones((len(self.parts), 1))], axis=1)
        return Measure(parts * kept[:, None], value, self.is_binary)

    def total(self) -> float:
        """Over all questions, each once."""
        return float(self.value(self.parts.sum(0)))


def mean(values: Sequence[float], is_binary: bool = False) -> Measure:
    """The mean over questions."""
    return ratio(values, np.ones(len(values)), is_binary=is_binary)


def ratio(
    above: Sequence[float], below: Sequence[float], then: Callable[[Any], Any] = lambda x: x, is_binary: bool = False
) -> Measure:
    """One sum divided by another, such as nats by tokens; `then` is applied to the quotient."""

    def value(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return then(sums[..., 0] / sums[..., 1])

    return Measure(np.stack([np.asarray(above, float), np.asarray(below, float)], axis=1), value, is_binary)


@dataclass(frozen=True)
class Figure:
    """A value, and the interval that holds it in 95 of 100 samples of questions; None where nothing can be known."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]")


def resamples(n: int, count: int, seed: int) -> np.ndarray:
    """(count, n): how often each of n questions occurs in each of `count` resamples of n. All measures of all systems
    are computed on the same ones, which pairs them. (scipy.stats.bootstrap would draw anew for each, and needs the
    values of every resample at once; tests compare with it.)"""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)


def spread(measure: Measure, weights: np.ndarray) -> np.ndarray:
    """(R,) values of a measure on each of R resamples."""
    return np.asarray(measure.value(weights @ measure.parts))


def figure(measure: Measure, weights: np.ndarray) -> Figure:
    """A value with its interval, by the percentiles of its bootstrap distribution (Efron, 1979)."""
    return Figure(measure.total(), *interval(spread(measure, weights), weights.shape[1]))


def interval(values: np.ndarray, n: int) -> tuple[float | None, float | None]:
    """The middle 95 % of some values; None for fewer than 2 questions, and where nothing finite is left."""
    finite = values[np.isfinite(values)]
    if n < MIN_QUESTIONS or not len(finite):
        return None, None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def figures(measures: Mapping[str, Mapping[str, Measure]], count: int, seed: int) -> dict[str, dict[str, Figure]]:
    """{system: {name: measure}} -> the figure of each."""
    n = len(next(iter(next(iter(measures.values())).values())).parts)
    weights = resamples(n, count, seed)
    return {
        system: {name: figure(measure, weights) for name, measure in own.items()} for system, own in measures.items()
    }


@dataclass(frozen=True)
class Difference:
    """How much the first of two systems is above the second one, on the same questions."""

    figure: Figure
    p: float | None  # of McNemar's test for what is right or wrong, else of the bootstrap; None: nothing can be known
    n: int  # questions
    n_needed: int | None  # questions with which one of this size would be seen; None: none is, or seeds count as well

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval leaves out 0 and, of what is right or wrong, McNemar's test agrees."""
        is_outside = self.figure.low is not None and (self.figure.low > 0 or self.figure.high < 0)
        return is_outside and self.p is not None and self.p < 1 - CONFIDENCE

    def __str__(self) -> str:
        if self.is_distinguishable:
            return f"{self.figure}, {p_text(self.p)}"
        needed = f"; about {self.n_needed:,} questions would show it" if self.n_needed else ""
        return f"{self.figure}, not distinguishable with {self.n} questions{needed}"


def few(n: int) -> list[str]:
    """A sentence where questions are few."""
    if n >= FEW:
        return []
    return [f"{n} questions are few: of fewer than {FEW}, intervals are too narrow and p values too small"]


def p_text(p: float | None) -> str:
    """`p 0.012`, and for the smallest that can be told `p < 0.001`."""
    return "p unknown" if p is None else "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def difference(
    first: Sequence[Measure], second: Sequence[Measure], count: int, seed: int, weights: np.ndarray | None = None
) -> Difference:
    """The first minus the second, in pairs over questions. With several measures of one, of the same questions, each is
    a seed: seeds are drawn, with replacement, in every resample as well, which is a second level of chance.

    `weights`: `resamples` with this count and seed, where they are there already.
    """
    n = len(first[0].parts)
    weights = resamples(n, count, seed) if weights is None else weights
    rng = np.random.default_rng([seed, 1])
    drawn = [over_seeds(one, weights, rng) for one in (first, second)]
    value = float(np.mean([m.total() for m in first]) - np.mean([m.total() for m in second]))
    differences = drawn[0] - drawn[1]
    finite = differences[np.isfinite(differences)]
    shown = Figure(value, *interval(differences, n))
    if shown.low is None:
        return Difference(shown, None, n, None)
    is_of_seeds = len(first) > 1 or len(second) > 1  # of which more would be needed, too
    p = min(1.0, 2 * (1 + min((finite <= 0).sum(), (finite >= 0).sum())) / (len(finite) + 1))
    if first[0].is_binary and not is_of_seeds:
        p = mcnemar(first[0].parts[:, 0], second[0].parts[:, 0])
    return Difference(shown, float(p), n, None if is_of_seeds else needed(value, float(finite.std()), n))


def rank_correlation(pairs: Sequence[tuple[float, float]], count: int, seed: int) -> Figure | None:
    """The rank correlation (Spearman) of two values of some models, with its interval by the bootstrap over models;
    None for fewer than MIN_MODELS, and where one of the values is the same for all."""
    from scipy import stats

    values = np.array(pairs)
    if len(pairs) < MIN_MODELS or any(len(set(column)) == 1 for column in values.T):
        return None
    resampled = values[np.random.default_rng(seed).integers(len(pairs), size=(count, len(pairs)))]  # (R, models, 2)
    ranks = stats.rankdata(resampled, axis=1)  # anew: with the ranks among all models, intervals are too narrow
    apart = ranks - ranks.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # resamples of one model alone have no correlation
        drawn = (apart[..., 0] * apart[..., 1]).sum(1) / np.sqrt((apart**2).sum(1).prod(1))
    return Figure(float(stats.spearmanr(values[:, 0], values[:, 1]).statistic), *interval(drawn, len(pairs)))


def over_seeds(measures: Sequence[Measure], weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(R,) means over the measures of several seeds, which are drawn anew for each resample of questions."""
    values = np.stack([spread(measure, weights) for measure in measures])  # (seeds, R)
    k, count = values.shape
    if k == 1:
        return values[0]
    which = rng.integers(k, size=(k, count))
    return np.take_along_axis(values, which, axis=0).mean(0)


def needed(value: float, deviation: float, n: int) -> int | None:
    """Questions with which a difference of `value` is seen with POWER, from its standard error with n of them, which
    falls with their square root: (z(0.975) + z(0.8))^2 (deviation / value)^2 n."""
    if not value or not deviation or not math.isfinite(deviation):
        return None
    from scipy import stats  # 0.5 s

    z = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return max(2, math.ceil(min(1e12, n * (z * deviation / value) ** 2)))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """p of the exact test (McNemar, 1947): of the questions that only one of two has right, each may be either's with
    probability 1/2."""
    from scipy import stats

    only_first, only_second = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    n = only_first + only_second
    return float(stats.binomtest(only_first, n, 0.5).pvalue) if n else 1.0
