"""Successive halving: which jobs go on beyond a rung."""

import math

import pytest
from conftest import ROOT, sweep_job

from gpt.sweeps import halving
from gpt.sweeps.jobs import Job


def job(number, lr, losses, seed=1, status="paused"):
    """One with an evaluation every 100 tokens from 0 on."""
    rows = [{"step": i, "tokens": 100 * i, "val/loss": loss} for i, loss in enumerate(losses)]
    config = {"optimizer.lr": lr, "seed": seed}
    typed = [f"{key}={value}" for key, value in config.items()]
    return Job(ROOT / f"{number}", number, typed, config, status=status, rows=rows)


def ladder(losses):
    """Jobs of different learning rates with these losses at the rung of 100 tokens."""
    return [job(i, 0.001 * (i + 1), [9.0, loss]) for i, loss in enumerate(losses)]


def kept(jobs, keep=0.5, rung=100):
    return [one.number for one in halving.survivors(jobs, rung, keep)]


@pytest.mark.parametrize(
    ("rung", "loss"), [(0, 9.0), (1, 8.0), (100, 8.0), (101, 5.0), (200, 5.0), (300, 7.0), (301, None)]
)
def test_the_loss_at_a_rung_is_that_of_the_first_evaluation_with_so_many_tokens(rung, loss):
    assert halving.loss_at(job(0, 0.1, [9.0, 8.0, 5.0, 7.0]), rung) == loss


def test_rows_without_an_evaluation_are_no_rung():
    rows = [{"step": 1, "tokens": 100, "train/loss": 3.0}, {"step": 2, "val/loss": 4.0}, {"step": 3, "tokens": 130}]
    one = Job(ROOT, 0, [], {}, rows=[*rows, {"step": 4, "tokens": 140, "val/loss": 5.0}])
    assert halving.loss_at(one, 100) == 5.0
    assert halving.loss_at(Job(ROOT, 0, [], {}, rows=rows), 100) is None


@pytest.mark.parametrize(
    ("n", "keep", "expected"),
    [
        (1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (5, 0.5, 3), (7, 0.5, 4), (8, 0.5, 4), (9, 1 / 3, 3), (10, 0.34, 4),
        (4, 0.01, 1), (3, 0.99, 3), (100, 0.07, 7), (50, 0.14, 7), (200, 0.29, 58),
    ],
)  # fmt: skip
def test_so_many_of_the_best_go_on_rounded_up(n, keep, expected):
    losses = [5.0 + (7 * i % n) for i in range(n)]  # in no order
    best = sorted(range(n), key=lambda i: losses[i])[:expected]
    assert kept(ladder(losses), keep) == sorted(best)


def test_the_jobs_stay_in_their_order_and_only_the_loss_at_the_rung_counts():
    late = job(3, 0.5, [9.0, 6.5, 0.1])  # far better, later
    assert kept([job(0, 0.1, [1.0, 7.0]), job(1, 0.2, [9.0, 5.0]), job(2, 0.3, [9.0, 4.0]), late]) == [1, 2]


def test_of_equal_ones_those_that_come_first_go_on():
    assert kept(ladder([5.0, 4.0, 5.0, 5.0])) == [0, 1]
    assert kept(ladder([5.0, 5.0, 5.0, 5.0, 5.0])) == [0, 1, 2]


def test_nan_and_infinity_are_the_worst():
    assert kept(ladder([math.nan, 5.0, math.inf, 6.0])) == [1, 3]
    assert kept(ladder([math.nan, 5.0, math.nan, math.nan])) == [0, 1]  # half of them, whatever they are worth


def test_a_job_that_did_not_come_so_far_takes_nobodys_place():
    jobs = [*ladder([5.0, 6.0]), job(2, 0.3, [9.0], status="failed"), job(3, 0.4, [], status="failed")]
    assert kept(jobs) == [0]  # half of the two
    assert kept(jobs[2:]) == [] and kept([]) == []


def test_seeds_of_one_setting_go_on_or_stop_together_by_their_mean():
    jobs = [
        job(0, 0.1, [9.0, 4.0], seed=1), job(1, 0.1, [9.0, 8.0], seed=2),  # 6.0
        job(2, 0.2, [9.0, 5.0], seed=1), job(3, 0.2, [9.0, 5.5], seed=2),  # 5.25
        job(4, 0.3, [9.0, 5.8], seed=1), job(5, 0.3, [9.0, math.nan], seed=2),  # none
        job(6, 0.4, [9.0, 6.5], seed=1), job(7, 0.4, [9.0], seed=2, status="failed"),  # 6.5, of the one that is there
    ]  # fmt: skip
    assert kept(jobs) == [0, 1, 2, 3]
    assert kept(jobs, keep=0.25) == [2, 3]
    assert kept(jobs, keep=0.75) == [0, 1, 2, 3, 6]


def test_the_finished_jobs_of_a_sweep_take_part_with_what_they_had_at_the_rung(tmp_path):
    """Reference, by hand, with rungs at 1,000 and 3,000 tokens over four folders: 2 of 4, then 1 of 2."""
    losses = [[9, 7.0, 6.5, 6.0], [9, 5.0, 4.9, 4.8], [9, 6.0, 4.0, 3.0], [9, 8.0, 1.0, 1.0]]
    found = [sweep_job(tmp_path, i, {"optimizer.lr": 0.1 + i}, one, status="completed") for i, one in enumerate(losses)]
    assert kept(found, rung=1000) == [1, 2]
    assert kept(found[1:3], rung=3000) == [2]
