"""The length of a run, how far it is, and what is due."""

from dataclasses import replace

import pytest
from conftest import train_section

from gpt import progress
from gpt.progress import Progress, due_at, is_finished, rescaled, scored


def test_the_scale_grows_after_many_steady_steps_and_shrinks_at_once():
    steady = Progress(loss_scale=8.0, steady=progress.SCALE_GROWS_AFTER - 2)
    after = rescaled(steady, 8.0)
    assert (after.loss_scale, after.steady) == (8.0, progress.SCALE_GROWS_AFTER - 1)
    after = rescaled(after, 8.0)
    assert (after.loss_scale, after.steady) == (16.0, 0)
    after = rescaled(replace(after, steady=5), 4.0)
    assert (after.loss_scale, after.steady) == (4.0, 0)


def test_each_thing_is_due_at_its_multiples_and_after_the_last_step():
    cfg = train_section(log_every=2, eval_every=3, sample_every=None, save_every=4)
    due = {step: due_at(step, cfg, total_steps=7) for step in range(8)}
    assert due[0] == (False, True, False, False)  # the loss before training
    assert [step for step in due if due[step].log] == [2, 4, 6, 7]
    assert [step for step in due if due[step].evaluation] == [0, 3, 6, 7]
    assert [step for step in due if due[step].sample] == []
    assert [step for step in due if due[step].checkpoint] == [4, 7]


def test_the_rest_of_an_interval_at_the_end_is_no_point_of_the_curve_unless_it_is_half_of_one():
    def logged(total_steps, log_every):
        return [n for n in range(1, total_steps + 1) if due_at(n, train_section(log_every=log_every), total_steps).log]

    assert logged(41, 20) == [20, 40]
    assert logged(50, 20) == [20, 40, 50]
    assert logged(3, 20) == [3]
    assert logged(3, 1) == [1, 2, 3]


@pytest.mark.parametrize(
    ("step", "limits", "text"),
    [
        (5, {"max_steps": 5}, "already at step 5 of 5; to train longer, type more, such as train.max_steps=10"),
        (5, {"max_tokens": 50}, "already at step 5 of 5; to train longer, type more, such as train.max_tokens=100"),
        (501, {"max_steps": 5}, "already at step 501: train.max_steps=5 is less; to train longer, type more, such as "
                                "train.max_steps=1002"),
        (3, {"max_steps": 5, "patience": 2}, "already at step 3, where train.patience=2 ended it; "
                                             "a larger one goes on"),
    ],
)  # fmt: skip
def test_a_run_that_is_over_says_what_trains_it_longer(step, limits, text):
    cfg, [key, *_] = train_section(**limits), limits
    assert progress.describe_end(Progress(step=step), cfg, 5, f"train.{key}") == text


def test_a_run_without_a_better_loss_for_as_long_as_patience_says_is_over():
    cfg = train_section(patience=2)
    now = Progress(step=4, reported=4)
    for loss, is_over in ((3.0, False), (3.5, False), (2.5, False), (2.6, False), (2.7, True)):
        now = scored(now, loss)
        assert is_finished(now, cfg, total_steps=10) == is_over
    assert (now.best, now.stale) == (2.5, 2)


def test_the_first_weights_which_no_checkpoint_has_are_the_best_only_until_others_are_evaluated():
    now = scored(Progress(), 7.10)
    assert (now.best, now.best_step) == (7.10, 0)
    now = scored(replace(now, step=5), 7.20)
    assert (now.best, now.best_step, now.stale) == (7.20, 5, 0)
    assert progress.due_after_evaluation(due_at(5, train_section(), 10), now, train_section(), 10).checkpoint
    now = scored(replace(now, step=10), 7.30)
    assert (now.best, now.best_step, now.stale) == (7.20, 5, 1)


def test_a_run_is_over_when_its_last_step_has_been_reported():
    cfg = train_section()
    assert not is_finished(Progress(step=10, reported=9), cfg, total_steps=10)
    assert is_finished(replace(Progress(step=10), reported=10), cfg, total_steps=10)


@pytest.mark.parametrize(
    ("max_steps", "epoch_steps", "max_tokens", "expected"),
    [
        (50, None, None, (50, "train.max_steps")),
        (50, 20, 10**9, (20, "train.max_epochs")),
        (None, 20, 1, (20, "train.max_epochs")),
        (None, None, 2560, (10, "train.max_tokens")),
        (None, None, 1, (1, "train.max_tokens")),
        (None, None, None, None),
    ],
)
def test_the_length_of_a_run_follows_from_its_budget(max_steps, epoch_steps, max_tokens, expected):
    assert progress.budget(max_steps, epoch_steps, max_tokens, 256) == expected
