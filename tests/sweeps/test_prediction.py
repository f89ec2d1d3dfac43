"""The predicted best learning rate of a sweep, its uncertainty, and how often it is right."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from gpt.sweeps import prediction
from gpt.sweeps.jobs import Job
from gpt.sweeps.leaderboard import is_result

LRS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
BEST, LOWEST, BEND = 8e-4, 4.0, 0.5  # of a known parabola


def known(lr, best=BEST, bend=BEND):
    return LOWEST + bend * (math.log10(lr) - math.log10(best)) ** 2


def job(number, lr, loss, seed=0, status="completed", **settings):
    config = {"optimizer.lr": lr, "seed": seed, **settings}
    rows = [] if loss is None else [{"step": 1, "tokens": 10, "val/loss": loss}]
    typed = [f"{key}={value}" for key, value in config.items()]
    return Job(Path(f"sweep/{number:08x}"), number, typed, config, status=status, rows=rows)


def sweep(lrs, loss_of, seeds=1, **settings):
    """Jobs at all learning rates, with `seeds` seeds each."""
    return [
        job(i, lr, loss_of(lr), seed=i % seeds, **settings)
        for i, lr in enumerate(lr for lr in lrs for _ in range(seeds))
    ]


def noisy(rng, sd=0.02, **parabola):
    return lambda lr: known(lr, **parabola) + rng.gauss(0, sd)


def arrays(jobs):
    done = [j for j in jobs if is_result(j)]
    return [j.setting("optimizer.lr") for j in done], [j.val_loss for j in done]


def test_three_losses_are_solved_by_hand_and_leave_no_uncertainty():
    # At log10(lr) = -4, -3, -2 the losses 5, 4, 4: 4 - z / 2 + z^2 / 2 with z = log10(lr) + 3, lowest at z = 1/2,
    # where it is 3.875.
    [found] = prediction.predictions([job(0, 1e-4, 5.0), job(1, 1e-3, 4.0), job(2, 1e-2, 4.0)])
    assert found.lr == pytest.approx(10**-2.5) and found.loss == pytest.approx(3.875)
    assert (found.low, found.high, found.loss_low, found.loss_high) == (None, None, None, None)
    assert str(found) == (
        "best optimizer.lr 0.0032, val/loss 3.8750 there, from 3 jobs. Look at 0.0032 next, between 0.001 and 0.01. "
        "No more jobs than a parabola has parameters: nothing is known of the uncertainty. "
        "Too few jobs to check it on left-out ones."
    )


def test_the_fit_is_that_of_numpys_polyfit():
    lrs, losses = arrays(sweep(LRS, noisy(random.Random(1)), seeds=3))
    curve = prediction.fit(lrs, losses)
    (c, b, a), covariance = np.polyfit(np.log10(lrs), losses, 2, cov=True)
    assert curve.minimum() == pytest.approx(-b / (2 * c))
    for lr in (2e-4, 1e-3, 5e-2):
        x = math.log10(lr)
        row = np.array([x * x, x, 1])
        half = scipy.stats.t.ppf(0.975, 12) * math.sqrt(row @ covariance @ row)
        assert curve.at(lr) == pytest.approx(a + b * x + c * x * x)
        assert curve.interval(lr) == pytest.approx((curve.at(lr) - half, curve.at(lr) + half))
        residuals = losses - np.polyval([c, b, a], np.log10(lrs))
        half = scipy.stats.t.ppf(0.975, 12) * math.sqrt(row @ covariance @ row + residuals @ residuals / 12)
        assert curve.interval(lr, of_a_job=True) == pytest.approx((curve.at(lr) - half, curve.at(lr) + half))


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_the_best_ends_where_a_t_test_of_the_slope_begins_to_reject(seed):
    lrs, losses = arrays(sweep(LRS, noisy(random.Random(seed), sd=0.05), seeds=2))
    low, high = prediction.fit(lrs, losses).minimum_interval()
    (c, b, _), covariance = np.polyfit(np.log10(lrs), losses, 2, cov=True)

    def p_value(x):  # that the slope 2cx + b is 0
        row = np.array([2 * x, 1, 0])
        return 2 * scipy.stats.t.sf(abs(2 * c * x + b) / math.sqrt(row @ covariance @ row), len(losses) - 3)

    best = -b / (2 * c)
    assert scipy.optimize.brentq(lambda x: p_value(x) - 0.05, best - 20, best) == pytest.approx(low)
    assert scipy.optimize.brentq(lambda x: p_value(x) - 0.05, best, best + 20) == pytest.approx(high)


@pytest.mark.parametrize(("lrs", "seeds"), [(LRS[:4], 1), (LRS[1:4], 2), (LRS, 3)])
def test_all_intervals_cover_what_is_known_19_times_in_20(lrs, seeds, record_property):
    """One degree of freedom, three, and twelve; the best is not in the middle of the rates tried."""
    rng, repetitions = random.Random(4), 500
    of_lr = of_loss = unbounded = inside = 0
    for _ in range(repetitions):
        jobs = sweep(lrs, noisy(rng), seeds)
        curve = prediction.fit(*arrays(jobs))
        low, high = curve.interval(BEST)
        of_loss += low <= LOWEST <= high
        low, high = curve.interval(BEST, of_a_job=True)
        inside += low <= noisy(rng)(BEST) <= high
        bounds = curve.minimum_interval()
        if bounds is None:  # all z, or all outside of an interval: it covers the best if its slope is not rejected
            unbounded += 1
            of_lr += covers_unbounded(curve)
        else:
            of_lr += bounds[0] <= math.log10(BEST) <= bounds[1]
    counts = {"best lr": of_lr, "loss there": of_loss, "one more job": inside}
    text = ", ".join(f"{name} {count}" for name, count in counts.items())
    record_property(
        "count", f"{repetitions} sweeps of {len(lrs)} lr x {seeds} seeds inside 95 %: {text} ({unbounded} unbounded)"
    )
    for name, count in counts.items():
        assert 0.92 < count / repetitions < 0.98, name  # 95 % +- 3 standard deviations


def covers_unbounded(curve):
    z = math.log10(BEST) - curve.middle
    row = np.array([0, 1, 2 * z])
    slope, error = row @ curve.coefficients, curve.s * math.sqrt(row @ curve.inverse @ row)
    return abs(slope) <= scipy.stats.t.ppf(0.975, curve.dof) * error


def test_held_out_jobs_are_inside_about_19_times_in_20_in_all(record_property):
    rng = random.Random(5)
    found = [p for _ in range(150) for p in prediction.predictions(sweep(LRS, noisy(rng), seeds=2))]
    inside, of = sum(p.inside for p in found), sum(p.held_out for p in found)
    record_property("count", f"{of} held-out jobs: {inside} inside the 95 % interval of the others")
    assert of == 1500
    assert 0.93 < inside / of < 0.97  # +- 3 standard deviations were they independent
    assert prediction.held_out(found).startswith(f"In all, {inside} of 1500 held-out jobs were inside")


@pytest.mark.parametrize("seed", range(5))
def test_a_held_out_job_is_outside_where_its_studentised_residual_is_large(seed):
    """A refit without each job is the same as the hat matrix of one fit (Cook and Weisberg, 1982)."""
    rng = random.Random(seed)
    jobs = sweep(
        LRS, lambda lr: known(lr) + rng.choice([0, 0, 0, 1]) * rng.gauss(0, 0.1) + rng.gauss(0, 0.001), seeds=2
    )
    lrs, losses = arrays(jobs)
    X = np.vander(np.log10(lrs), 3)
    hat = X @ np.linalg.pinv(X)
    residuals = losses - hat @ losses
    n, leverage = len(losses), np.diag(hat)
    others = (residuals @ residuals - residuals**2 / (1 - leverage)) / (n - 4)  # variance without each one
    studentised = np.abs(residuals) / np.sqrt(others * (1 - leverage))
    t = scipy.stats.t.ppf(0.975, n - 4)
    expected = int((studentised <= t).sum())
    [found] = prediction.predictions(jobs)
    assert (found.inside, found.held_out) == (expected, n)
    assert found.margin == pytest.approx(np.median(t * np.sqrt(others / (1 - leverage))))
    assert f"{expected} of 10 held-out jobs inside" in str(found)


def test_without_one_learning_rate_a_clear_best_is_predicted_all_the_same():
    [found] = prediction.predictions(sweep(LRS, noisy(random.Random(6), sd=0.001), seeds=2))
    assert (found.nearest, found.left_out) == (5, 5)
    assert "one lr left out at a time, 5 of 5 predictions nearest to the best lr tried" in str(found)
    [few] = prediction.predictions(sweep(LRS[:3], noisy(random.Random(6)), seeds=2))
    assert few.left_out == 0 and "left out at a time" not in str(few)


@pytest.mark.parametrize(("n", "jobs", "rates"), [(3, 0, 0), (4, 0, 4), (5, 5, 5)])
def test_as_much_is_left_out_as_leaves_a_parabola_and_for_jobs_an_uncertainty(n, jobs, rates):
    [found] = prediction.predictions(sweep(LRS[:n], noisy(random.Random(6))))
    assert (found.held_out, found.left_out) == (jobs, rates)


def test_where_losses_are_no_parabola_the_left_out_rates_tell():
    losses = dict(zip([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [4.5, 4.3, 4.1, 4.0, 3.9, 9.0], strict=True))
    [found] = prediction.predictions(sweep(losses, losses.get))
    assert found.nearest < found.left_out == 6
    assert "the best one tried is 0.01: over so wide a range the losses are no parabola" in found.sentence


def test_a_noisy_best_is_between_the_rates_around_it_and_near_the_truth():
    [found] = prediction.predictions(sweep(LRS, noisy(random.Random(7), sd=0.005), seeds=2))
    assert found.low < BEST < found.high and found.loss_low < LOWEST < found.loss_high
    assert 6e-4 < found.lr < 1e-3 and found.jobs == 10 and found.tried == LRS
    assert "95 % interval" in str(found) and "0.0003" not in found.sentence.split("next")[0]


def test_it_says_which_rates_to_look_between_and_when_there_is_little_to_gain():
    tried = noisy(random.Random(8), sd=0.001, best=1.02e-3)
    [found] = prediction.predictions(sweep(LRS, tried, seeds=2))
    assert found.sentence == "It has been tried already, with 0.001."
    sharp = noisy(random.Random(8), sd=0.001, best=5.5e-4)
    [found] = prediction.predictions(sweep(LRS, sharp, seeds=2))
    assert found.sentence == "Look at 0.00055 next, between 0.0003 and 0.001."
    [found] = prediction.predictions(sweep(LRS, noisy(random.Random(8), best=1.3e-3), seeds=2))
    assert found.sentence.startswith("Little to gain between ") and "at 0.001 the curve is 0.0" in found.sentence


@pytest.mark.parametrize(
    ("best", "sentence", "is_given"),
    [
        (2e-2, "0.01 and above next", True),
        (5e-5, "0.0001 and below next", True),
        (1e3, "0.01 and above next", False),  # a number five decades away would be made up
    ],
)
def test_a_lowest_point_outside_of_what_was_tried_is_called_an_extrapolation(best, sentence, is_given):
    [found] = prediction.predictions(sweep(LRS, noisy(random.Random(9), sd=0.001, best=best), seeds=2))
    assert found.sentence == (
        f"The lowest point is outside the rates tried, 0.0001 to 0.01, an extrapolation: look at {sentence}."
    )
    assert (found.lr is not None) == (found.loss is not None) == is_given
    assert found.nearest == found.left_out == 5  # within what was tried, the edge is where it points to
    if is_given:
        assert found.low < found.lr < found.high and found.lr == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize(
    ("slope", "words"), [(-1, "look at 0.01 and above next"), (1, "look at 0.0001 and below next")]
)
@pytest.mark.parametrize("bend", [-0.05, 0.0])
def test_a_parabola_that_does_not_open_upward_has_no_best(slope, bend, words):
    losses = lambda lr: 5 + slope * math.log10(lr) + bend * math.log10(lr) ** 2  # noqa: E731
    [found] = prediction.predictions(sweep(LRS, losses))
    assert (found.lr, found.low, found.loss) == (None, None, None)
    if bend:  # of a straight line, rounding may leave either: without a lowest point, or with one far away
        assert found.sentence == f"The parabola does not open upward, so it has no lowest point: {words}."
    assert words in found.sentence and str(found).startswith("no best optimizer.lr can be predicted, from 5 jobs.")


def test_a_downward_parabola_around_a_lucky_job_asks_for_more_seeds():
    losses = [4.5, 5.0, 4.4, 5.0, 4.5]
    [found] = prediction.predictions([job(i, lr, loss) for i, (lr, loss) in enumerate(zip(LRS, losses, strict=True))])
    assert "does not open upward" in found.sentence and "0.001, may be so by chance; more seeds first" in found.sentence


@pytest.mark.parametrize("loss", [0.1, 4.1, 10.83])
@pytest.mark.parametrize("slope", [0, 0.3])
def test_rounding_does_not_bend_a_straight_line_upward(loss, slope):
    for n in range(3, 9):
        lrs = [1e-4 * 1.7**i for i in range(n)]
        [found] = prediction.predictions(sweep(lrs, lambda lr: loss + slope * math.log10(lr / 1e-4), seeds=2))
        assert found.lr is None and "no lowest point" in found.sentence


def test_a_bend_that_is_not_there_is_seldom_given_an_interval(record_property):
    rng, upward, bounded, warned = random.Random(10), 0, 0, 0
    for _ in range(250):
        jobs = sweep(LRS, noisy(rng, bend=0.0), seeds=2)
        curve = prediction.fit(*arrays(jobs))
        upward += curve.minimum() is not None
        bounded += curve.minimum_interval() is not None
        warned += "may be chance" in prediction.predictions(jobs)[0].sentence
    record_property(
        "count", f"250 flat sweeps: {upward} upward parabolas, {bounded} with an interval, {warned} with a warning"
    )
    assert 100 < upward < 150 and bounded < 250 * 0.05  # half of 5 % are upward
    assert warned > 30


def test_each_combination_of_the_other_settings_has_its_own():
    jobs = [
        *sweep(LRS, lambda lr: known(lr, best=3e-4), seeds=2, **{"model.context_length": 64, "train.compile": True}),
        *sweep(LRS, lambda lr: known(lr, best=3e-3), seeds=2, **{"model.context_length": 128, "train.compile": True}),
        *sweep(LRS[:2], known, seeds=2, **{"model.context_length": 256, "train.compile": None}),
    ]
    first, second = prediction.predictions(jobs)
    assert first.settings == {"model.context_length": 64, "train.compile": True}
    assert (first.lr, second.lr) == (pytest.approx(3e-4), pytest.approx(3e-3))
    assert str(second).startswith("model.context_length=128 train.compile=true: best optimizer.lr 0.003 (95 % interval")


def test_only_completed_jobs_with_a_loss_and_a_rate_count():
    jobs = sweep(LRS[:3], known)
    more = [
        job(10, 3e-3, 1.0, status="halved"), job(11, 3e-3, 1.0, status="failed"), job(12, 3e-3, math.nan),
        job(13, 3e-3, None), job(14, 3e-3, math.inf), job(15, None, 1.0), job(16, "a", 1.0), job(17, True, 1.0),
    ]  # fmt: skip
    [found] = prediction.predictions([*jobs, *more])
    assert (found.jobs, found.tried) == (3, LRS[:3]) and found.lr == pytest.approx(BEST)
    assert prediction.predictions([*jobs[:2], *more]) == []


def test_seeds_may_be_missing_for_some_rates():
    jobs = [j for j in sweep(LRS, noisy(random.Random(11)), seeds=3) if j.number not in (0, 1, 7, 13, 14)]
    lrs, losses = arrays(jobs)
    c, b, _ = np.polyfit(np.log10(lrs), losses, 2)
    [found] = prediction.predictions(jobs)
    assert math.log10(found.lr) == pytest.approx(-b / (2 * c)) and found.held_out == 10
    [found] = prediction.predictions([*sweep(LRS, known), *(job(9 + i, 1e-3, known(1e-3), seed=i) for i in (1, 2, 3))])
    assert found.sentence.startswith("Look at 0.0008 next, ") and found.nearest == 5  # a mean of 4 is no sum of 4


@pytest.mark.parametrize("lrs", [[], [1e-3], [1e-3, 3e-3], [1e-3, 1e-3 * (1 + 1e-9), 1e-3 * (1 + 2e-9)]])
def test_nothing_is_predicted_from_fewer_than_three_learning_rates(lrs):
    assert prediction.predictions(sweep(lrs, known, seeds=3)) == []


def test_nothing_is_predicted_when_the_learning_rate_is_not_varied():
    assert prediction.predictions(sweep([1e-3], known, seeds=3) + sweep([1e-3], known, **{"model.n_layer": 3})) == []
    assert prediction.held_out([]) is None


@pytest.mark.parametrize("n", range(3, 7))
def test_a_best_at_a_tried_rate_and_rates_close_together_are_no_trouble(n):
    for first in (1e-300, 1e-12, 1e-3, 1, 1e300):
        for ratio in (1.0001, 1.1, 3, 10):
            lrs = [first * ratio**i for i in range(n)]
            for best in lrs:
                [found] = prediction.predictions(sweep(lrs, lambda lr, best=best: known(lr, best=best)))
                x, step = math.log10(found.lr), math.log10(ratio)
                assert x == pytest.approx(math.log10(best), abs=0.05 * step), (first, ratio, best)
                assert str(found)
