"""Intervals, comparisons in pairs, McNemar's test, and the number of questions that a difference needs."""

import math

import numpy as np
import pytest
from scipy import stats

from gpt.evaluation import statistics
from gpt.evaluation.statistics import Measure, difference, figure, mcnemar, mean, needed, ratio, resamples

RNG = np.random.default_rng(0)
VALUES = RNG.gamma(2.0, size=40)


def test_an_interval_is_that_of_scipys_percentile_bootstrap():
    own = figure(mean(VALUES), resamples(40, 20_000, 1))
    other = stats.bootstrap((VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert own.value == pytest.approx(VALUES.mean())
    assert (own.low, own.high) == pytest.approx((other.low, other.high), abs=0.02)


def test_a_perplexity_is_the_exponential_of_all_nats_by_all_tokens_and_so_is_its_interval():
    tokens = RNG.integers(5, 50, size=40)
    nats = tokens * VALUES
    own = figure(ratio(nats, tokens, np.exp), resamples(40, 20_000, 1))
    other = stats.bootstrap(
        (nats, tokens), lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)), paired=True, n_resamples=20_000,
        method="percentile", rng=2,
    ).confidence_interval  # fmt: skip
    assert own.value == pytest.approx(math.exp(nats.sum() / tokens.sum()))
    assert (own.low, own.high) == pytest.approx((other.low, other.high), rel=0.02)


def test_intervals_hold_the_truth_in_about_95_of_100_samples():
    rng, held = np.random.default_rng(3), 0
    for seed in range(300):
        own = figure(mean(rng.normal(1.0, size=60)), resamples(60, 400, seed))
        held += own.low <= 1.0 <= own.high
    assert 0.90 <= held / 300 <= 0.98


def test_one_question_has_no_interval_and_the_same_value_everywhere_has_an_interval_of_no_width():
    assert figure(mean([0.5]), resamples(1, 100, 0)).low is None
    own = figure(mean([0.5] * 9), resamples(9, 100, 0))
    assert own.low == own.high == 0.5


def test_pairs_are_told_apart_where_the_same_values_on_other_questions_would_not_be():
    first, second = mean(VALUES + 0.05), mean(VALUES)
    paired = difference([first], [second], 2000, 0)
    assert paired.is_distinguishable and paired.figure.value == pytest.approx(0.05) and paired.p < 0.01
    shuffled = difference([first], [mean(RNG.permutation(VALUES))], 2000, 0)
    assert not shuffled.is_distinguishable and "not distinguishable with 40 questions" in str(shuffled)
    assert shuffled.p == pytest.approx(shuffled.p, abs=1) and shuffled.n_needed > 40


def test_a_model_is_not_distinguishable_from_itself():
    same = difference([mean(VALUES)], [mean(VALUES)], 500, 0)
    assert (same.figure.value, same.p, same.n_needed) == (0.0, 1.0, None)
    assert str(same) == "0 [0, 0], not distinguishable with 40 questions"


def test_the_bootstrap_calls_equal_models_different_in_about_5_of_100_cases():
    rng, called = np.random.default_rng(5), 0
    for seed in range(300):
        a, b = rng.normal(size=(2, 50))
        called += difference([mean(a)], [mean(b)], 400, seed).is_distinguishable
    assert called / 300 <= 0.10


def test_mcnemar_is_the_exact_binomial_test_of_the_questions_that_one_alone_has_right():
    first, second = np.array([1] * 9 + [0] * 2 + [1] * 5), np.array([0] * 9 + [1] * 2 + [1] * 5)
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11  # P(at most 2 of 11)
    assert mcnemar(first, second) == pytest.approx(2 * tail)
    assert mcnemar(first, first) == 1.0
    of_both = difference([mean(first, True)], [mean(second, True)], 500, 0)
    assert of_both.p == pytest.approx(2 * tail)


def test_what_is_right_or_wrong_is_told_apart_only_where_mcnemars_test_agrees():
    first, second = np.array([1] * 5 + [0] * 15), np.zeros(20)
    of_both = difference([mean(first, True)], [mean(second, True)], 2000, 0)
    assert of_both.figure.low > 0 and of_both.p == pytest.approx(2 / 2**5)  # 0.0625
    assert not of_both.is_distinguishable and "not distinguishable with 20 questions" in str(of_both)


def test_the_number_of_questions_that_is_named_shows_the_difference_in_four_of_five_samples():
    n = needed(0.5, 1.0 / math.sqrt(20), 20)  # a difference of half a standard deviation, seen with 20 questions
    assert n == math.ceil((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 / 0.25) == 32
    rng = np.random.default_rng(7)
    shown = [
        difference([mean(rng.normal(0.5, size=n))], [mean(np.zeros(n))], 400, seed).is_distinguishable
        for seed in range(200)
    ]
    assert 0.7 <= np.mean(shown) <= 0.9


def test_seeds_that_differ_widen_the_interval_of_a_difference():
    seeds = [mean(VALUES + shift) for shift in (-0.5, 0.0, 0.5)]
    alone = difference([mean(VALUES + 0.1)], [mean(VALUES)], 2000, 0)
    over_seeds = difference([mean(VALUES + 0.1 + s) for s in (-0.5, 0.0, 0.5)], seeds, 2000, 0)
    assert alone.is_distinguishable and not over_seeds.is_distinguishable
    assert over_seeds.figure.value == pytest.approx(0.1) and over_seeds.n_needed is None
    expected = math.sqrt(2 * np.var([-0.5, 0.0, 0.5]) / 3)  # of a mean of three seeds that are drawn, twice
    assert (over_seeds.figure.high - over_seeds.figure.low) / 2 == pytest.approx(1.96 * expected, rel=0.15)


def test_what_cannot_be_divided_is_left_out_of_the_interval():
    own = figure(ratio([1, 0, 0], [1, 0, 0]), resamples(3, 200, 0))
    assert (own.value, own.low, own.high) == (1.0, 1.0, 1.0)


def test_a_measure_over_some_questions_takes_their_parts():
    own = Measure(np.array([[1.0], [2.0], [4.0]]), lambda sums: sums[..., 0])
    assert own.take([0, 2]).total() == 5.0
    assert statistics.p_text(0.0001) == "p < 0.001" and statistics.p_text(0.0123) == "p 0.012"


def test_a_rank_correlation_is_spearmans_and_needs_five_models():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=30)
    scores = -losses + rng.normal(size=30)
    own = statistics.rank_correlation(list(zip(losses, scores, strict=True)), 4000, 1)
    assert own.value == pytest.approx(stats.spearmanr(losses, scores).statistic)
    distribution = stats.bootstrap(
        (losses, scores), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=500, method="percentile", rng=2,
    ).confidence_interval  # fmt: skip
    assert (own.low, own.high) == pytest.approx((distribution.low, distribution.high), abs=0.1)
    few = list(zip(losses[:8], scores[:8], strict=True))  # the models of a resample are ranked among themselves
    drawn = rng.integers(8, size=(2000, 8))
    again = [stats.spearmanr(np.array(few)[which]).statistic for which in drawn if len(set(which)) > 1]
    own = statistics.rank_correlation(few, 10_000, 1)
    assert (own.low, own.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=0.05)
    perfect = [(float(i), float(i)) for i in range(5)]
    assert statistics.rank_correlation(perfect, 100, 0).value == pytest.approx(1.0)
    assert statistics.rank_correlation(perfect[:4], 100, 0) is None  # one of 24 orders is as good by chance
    assert statistics.rank_correlation([(i, 2.0) for i, _ in perfect], 100, 0) is None
