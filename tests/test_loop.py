"""The training loop."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    adamw_config,
    data_config,
    made_split,
    model_config,
    modern_config,
    schedule_config,
    train_section,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import optim
from gpt.data.batching import Batches, Cut, TrainBatches, collate, eval_batches
from gpt.errors import UserError
from gpt.loop import fit, train_step
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.modern import Modern
from gpt.objective import NEXT_TOKEN
from gpt.progress import Progress

CPU = Machine(torch.device("cpu"))
FLOAT16 = Machine(torch.device("cpu"), torch.float16)
SPLIT = made_split([5, 9, 17, 4, 30, 12, 8, 8, 6, 21, 7, 11] * 3)
VAL = made_split([7, 19, 12], seed=1, name="val")


def settings(schedule=None, **changes):
    """The sections of a configuration that the loop reads."""
    return SimpleNamespace(train=train_section(**changes), schedule=schedule or schedule_config(), seed=3)


def batches_of(cfg, total_steps=10, **data):
    """What a run trains on and is scored on."""
    data = data_config(**data)
    train = TrainBatches(SPLIT, data, 16, cfg.train, seed=cfg.seed)
    return Batches(train, eval_batches(VAL, data, 16, cfg.train), None, total_steps, "train.max_steps")


def run(
    model=None,
    progress=None,
    total_steps=10,
    optimizer_cfg=None,
    optimizer=None,
    data=None,
    interrupt=None,
    dtype=torch.float32,
    **changes,
):
    """A small run from start to end, or to step `interrupt`: (events, model, optimizer, progress)."""
    torch.manual_seed(0)
    model = model or GPT(model_config(dropout=0.1), 50)
    optimizer = optimizer or optim.build(model, optimizer_cfg or adamw_config(lr=1e-2))
    progress = progress or Progress()
    cfg = settings(**changes)
    batches = batches_of(cfg, total_steps, **(data or {}))
    events = fit(model, optimizer, NEXT_TOKEN, batches, cfg, Machine(CPU.device, dtype), progress)
    seen = []
    for event in events:
        if not event.row:  # a checkpoint that does not wait for the evaluation
            continue
        seen.append(event)
        progress = event.progress
        if progress.step == interrupt:
            break
    return seen, model, optimizer, progress


def micro_batches():
    return TrainBatches(SPLIT, data_config(), 16, train_section(), seed=3).step(0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_batch_is_overfitted():
    events, *_ = run(total_steps=150, one_batch=True, tokens_per_step=32, model=GPT(model_config(), 50))
    assert events[-1].row["train/loss"] < 0.1


def test_one_step_gives_these_values():
    """A refactor does not change the loss. If this fails and the change was meant (another initialisation, another
    order of batches, another torch), say why in the commit and put the new values here."""
    events, *_ = run(total_steps=2, log_every=1)
    assert [event.row["train/loss"] for event in events[1:]] == pytest.approx([3.90766, 3.93672], abs=1e-4)


def test_fifty_steps_follow_the_curve_of_the_plainest_step():
    """All logits at once, torch's cross-entropy, its own AdamW, unfused, and clipping of every step."""
    torch.manual_seed(0)
    model = GPT(model_config(), 50)
    plain = copy.deepcopy(model)
    events, *_ = run(model=model, total_steps=50, log_every=1, micro_batch=1)
    groups = optim.decay_groups(plain.named_parameters(), adamw_config().weight_decay)
    cfg = adamw_config(lr=1e-2)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, foreach=False)
    batches = TrainBatches(SPLIT, data_config(), 16, train_section(), seed=3)
    losses = []
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * optim.lr_factor(schedule_config(), step, 50)
        micro_batches = batches.step(step)
        n_targets = sum(batch.n_targets for batch in micro_batches)
        loss = sum(
            torch.nn.functional.cross_entropy(
                plain(batch.inputs, batch.positions, batch.documents).flatten(0, 1), batch.targets.flatten(),
                reduction="sum",
            )
            for batch in micro_batches
        ) / n_targets  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5  # it has learned something on the way
    assert [event.row["train/loss"] for event in events[1:]] == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_bit(dtype):
    ends = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT(model_config(dropout=0.1), 50)
        model.gradient_checkpointing = gradient_checkpointing
        _, model, *_ = run(model=model, dtype=dtype, total_steps=3)
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_each_matrix_is_converted_once_in_a_step_however_many_micro_batches_it_has():
    torch.manual_seed(0)
    model = GPT(model_config(tie_weights=False), 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    shapes = [p.shape for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2]

    class Conversions(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
                self.n += args[0].shape in shapes
            return operator(*args, **(kwargs or {}))

    batches = TrainBatches(SPLIT, data_config(), 16, train_section(micro_batch=1), seed=3).step(0)
    with Conversions() as conversions:
        train_step(model, optimizer, NEXT_TOKEN, batches, Machine(CPU.device, torch.bfloat16))
    assert len(batches) > 1
    assert conversions.n == len(shapes)


class TestFloat16:
    def test_learns_as_float32_does(self):
        curves = []
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(0)
            events, *_ = run(model=GPT(model_config(), 50), dtype=dtype, total_steps=30, log_every=1)
            curves.append([event.row["train/loss"] for event in events[1:]])
        assert curves[0] != curves[1]
        assert curves[1] == pytest.approx(curves[0], abs=0.02)

    def test_gradients_too_small_for_it_are_kept_by_the_scale(self):
        """2^-24 is the smallest number of float16: at a scale of 1 the gradients of a loss of 1e-6 vanish."""
        norms = {}
        for loss_scale in (1.0, 2.0**16):
            torch.manual_seed(0)
            model = GPT(model_config(), 50)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            tiny = [replace(batch, n_targets=batch.n_targets * 10**6) for batch in micro_batches()]
            norms[loss_scale] = train_step(model, optimizer, NEXT_TOKEN, tiny, FLOAT16, loss_scale=loss_scale)[1]
        exact = train_step(model, optimizer, NEXT_TOKEN, tiny, CPU)[1]
        assert norms[2.0**16] == pytest.approx(exact, rel=0.01)
        assert norms[1.0] != pytest.approx(exact, rel=0.01)

    def test_a_step_whose_gradients_overflow_is_taken_again_with_half_the_scale(self):
        start = Progress(loss_scale=2.0**40)
        _, model, _, progress = run(dtype=torch.float16, progress=start, total_steps=3)
        assert progress.step == 3 and progress.skipped == 0
        assert progress.loss_scale < 2.0**30
        _, fitting, *_ = run(dtype=torch.float16, progress=Progress(loss_scale=progress.loss_scale), total_steps=3)
        assert torch.equal(weights(model), weights(fitting))

    def test_a_loss_that_is_not_finite_is_no_overflow_of_the_scale(self):
        model = GPT(model_config(), 50)
        with torch.no_grad():
            model.wpe.weight[0] = math.inf
        with pytest.raises(UserError, match="loss nan"):
            run(model=model, dtype=torch.float16, eval_every=100)


def test_micro_batches_of_any_size_give_the_gradient_of_one_batch():
    """Losses are weighted by targets: rows here have between 1 and 13 of them."""
    segments = Cut(SPLIT, 16, "response", "split")
    rows = [[i] for i in range(8)]
    gradients = []
    for size in (8, 4, 2, 1):
        torch.manual_seed(0)
        model = GPT(model_config(), 50)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = weights(model)
        batches = [collate(SPLIT.ids, segments, rows[i : i + size]) for i in range(0, 8, size)]
        loss, _ = train_step(model, optimizer, NEXT_TOKEN, batches, CPU)
        gradients.append((loss, before - weights(model)))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        assert torch.allclose(gradient, gradients[0][1], atol=1e-6)


@pytest.mark.parametrize(
    "knob", [{"eval_every": 1}, {"eval_tokens": 10}, {"log_every": 1}, {"save_every": 1}, {"sample_every": 1}]
)
def test_evaluating_logging_sampling_and_saving_change_no_weight(knob):
    expected = weights(run()[1])
    assert torch.equal(weights(run(**knob)[1]), expected)


def test_a_mean_of_the_weights_is_evaluated_beside_them_and_changes_neither_them_nor_what_is_best():
    torch.manual_seed(0)
    events, model, *_ = run()
    torch.manual_seed(0)
    averaged_model = GPT(model_config(dropout=0.1), 50)
    optimizer = optim.build(averaged_model, adamw_config(lr=1e-2), ema=0.5)
    averaged, *_ = run(model=averaged_model, optimizer=optimizer, eval_every=5)
    assert torch.equal(weights(model), weights(averaged_model))
    pairs = [(a.row, b.row) for a, b in zip(events, averaged, strict=True) if "val/loss" in a.row]
    assert all(a["val/loss"] == b["val/loss"] for a, b in pairs)
    first, *later = [b["val/loss_ema"] - b["val/loss"] for _, b in pairs]
    assert first == 0 and all(later)  # before the first step there is no mean
    assert [event.best for event in events] == [event.best for event in averaged]


def test_random_numbers_drawn_between_steps_change_no_weight():
    expected = weights(run()[1])
    torch.manual_seed(0)
    model, cfg = GPT(model_config(dropout=0.1), 50), settings()
    optimizer = optim.build(model, adamw_config(lr=1e-2))
    for _ in fit(model, optimizer, NEXT_TOKEN, batches_of(cfg), cfg, CPU, Progress()):
        torch.rand(7)
    assert torch.equal(weights(model), expected)


@pytest.mark.parametrize("at", [2, 4, 5, 6])
def test_stopping_and_going_on_gives_the_weights_and_rows_of_one_run(at):
    """At every yield the state is whole: also in the middle of an epoch, and of an interval between log rows."""
    events, model, *_ = run()
    _, half_model, half_optimizer, half_progress = run(interrupt=at)
    assert half_progress.step == at
    continued = GPT(model_config(dropout=0.1), 50)
    continued.load_state_dict(half_model.state_dict())
    state = copy.deepcopy(half_optimizer.state_dict())
    optimizer = optim.build(continued, adamw_config(lr=1e-2))
    optimizer.load_state_dict(state)
    rest, *_ = run(model=continued, optimizer=optimizer, progress=half_progress)
    assert torch.equal(weights(continued), weights(model))
    timing = {"tokens_per_second", "memory_gb"}
    rows = [{k: v for k, v in event.row.items() if k not in timing} for event in events]
    continued_rows = [{k: v for k, v in event.row.items() if k not in timing} for event in rest]
    assert continued_rows == [row for row in rows if row["step"] > at]


def test_rows_come_when_they_are_due():
    events, *_ = run(total_steps=7, log_every=3, eval_every=5, save_every=4, sample_every=7)
    assert [e.row["step"] for e in events if "train/loss" in e.row] == [3, 6]
    assert [e.row["step"] for e in events if "val/loss" in e.row] == [0, 5, 7]
    assert [e.row["step"] for e in events if e.sample_due] == [7]
    assert {4, 7} <= {e.row["step"] for e in events if e.checkpoint_due}
    assert events[-1].progress.step == 7


def test_the_logged_loss_is_the_mean_over_all_targets_since_the_last_row():
    each = [event.row for event in run(log_every=1)[0] if "train/loss" in event.row]
    batches = TrainBatches(SPLIT, data_config(), 16, train_section(), 3)
    targets = [sum(b.n_targets for b in batches.step(s)) for s in range(10)]
    pairs = zip(each[:5], targets[:5], strict=True)
    expected = sum(row["train/loss"] * n for row, n in pairs) / sum(targets[:5])
    assert run(log_every=5)[0][1].row["train/loss"] == pytest.approx(expected)


def test_where_a_checkpoint_and_an_evaluation_are_due_the_checkpoint_comes_first():
    cfg = settings(eval_every=2, save_every=4, log_every=2)
    torch.manual_seed(0)
    model = GPT(model_config(), 50)
    events = fit(model, optim.build(model, adamw_config(lr=1e-2)), NEXT_TOKEN, batches_of(cfg), cfg, CPU, Progress())
    order = [(e.unreported.step, "val/loss" in e.row, e.checkpoint_due, e.progress.reported) for e in events]
    for step in (4, 8, 10):
        first, second = (place for place in order if place[0] == step)
        assert first[1:3] == (False, True) and first[3] < step
        assert second[1:] == (True, True, step)
    assert [place[1] for place in order if place[0] in (2, 6)] == [True, True]  # due by save_every or the end only


def test_an_evaluation_that_is_the_best_so_far_asks_for_a_checkpoint():
    events, _, _, progress = run(eval_every=1, save_every=100)
    losses = [event.row["val/loss"] for event in events]
    assert progress.best == min(losses)
    assert progress.best_step == losses.index(min(losses))
    for i, event in enumerate(events[1:-1], start=1):
        assert event.checkpoint_due == (losses[i] < min(losses[:i]))


def test_training_stops_early_when_nothing_gets_better():
    events, *_ = run(optimizer_cfg=adamw_config(lr=1e-12), total_steps=50, eval_every=1, patience=3)
    assert events[-1].checkpoint_due and events[-1].row["step"] < 50


def test_a_run_that_stopped_early_does_not_go_on_when_it_is_started_again():
    events, *_ = run(progress=Progress(step=7, reported=7, stale=3, best=1.0), patience=3)
    assert events == []


def poisoned(steps, **changes):
    """A run in which one weight becomes NaN after each of the given steps, and is mended after the event that follows:
    (rows, error, weights at the end, weights when it was poisoned last)."""
    cfg = settings(**{"log_every": 1, "eval_every": 100, **changes})
    torch.manual_seed(0)
    model = GPT(model_config(), 50)
    optimizer = optim.build(model, adamw_config())
    rows, before, error = [], None, None
    good = model.ln_f.weight[0].item()
    try:
        for event in fit(model, optimizer, NEXT_TOKEN, batches_of(cfg, 6), cfg, CPU, Progress()):
            if not event.row:
                continue
            rows.append(event.row)
            with torch.no_grad():
                model.ln_f.weight[0] = math.nan if event.row["step"] in steps else good
            before = weights(model) if event.row["step"] in steps else before
    except UserError as stopped:
        error = stopped
    return rows, error, weights(model), before


def test_a_loss_that_is_not_finite_stops_before_the_update_and_is_in_the_metrics():
    rows, error, after, before = poisoned({2})
    assert error.code == 4 and "stopped at step 3: loss nan, gradient norm nan" in str(error)
    assert "learning rate" in str(error) and "documents " in str(error)
    assert math.isnan(rows[-1]["train/loss"]) and rows[-1]["step"] == 3
    assert torch.equal(after[before.isfinite()], before[before.isfinite()])


def test_updates_of_steps_that_are_not_finite_can_be_left_out_counted_and_limited():
    rows, error, _, _ = poisoned({2}, max_skipped=1, log_every=100, save_every=2)
    assert error is None
    assert [row["step"] for row in rows if "skipped" in row] == [3, 4, 6]  # step 3 is shown though no row was due
    assert math.isnan(rows[2]["grad_norm"]) and rows[-1]["skipped"] == 1
    assert math.isfinite(rows[-1]["train/loss"])  # the mean of the others
    _, error, _, _ = poisoned({1, 3}, max_skipped=1)
    assert error.code == 4 and "step 4" in str(error)


def test_an_evaluation_that_is_not_finite_stops_the_run():
    model = GPT(model_config(), 50)
    with torch.no_grad():
        model.ln_f.weight[0] = math.inf
    with pytest.raises(UserError, match="stopped at step 0: val/loss nan") as caught:
        run(model=model)
    assert caught.value.code == 4


@pytest.mark.parametrize("after", range(1, 40))
def test_a_run_that_is_asked_to_stop_at_any_moment_goes_on_to_the_same_rows_and_weights(after):
    """`stop` is called before every micro-batch and every batch of an evaluation; here its n-th call returns true."""
    events, model, *_ = run(micro_batch=1)
    assert after < 40 <= run_until(10**6)[0]
    n_calls, rows, progress, half_model, half_optimizer = run_until(after)
    assert n_calls == after  # it ended at once
    continued = GPT(model_config(dropout=0.1), 50)
    continued.load_state_dict(half_model.state_dict())
    optimizer = optim.build(continued, adamw_config(lr=1e-2))
    optimizer.load_state_dict(copy.deepcopy(half_optimizer.state_dict()))
    _, rest, _, continued, _ = run_until(10**6, continued, optimizer, progress)
    assert torch.equal(weights(continued), weights(model))
    timing = {"tokens_per_second", "memory_gb"}
    assert [{k: v for k, v in row.items() if k not in timing} for row in rows + rest] == [
        {k: v for k, v in event.row.items() if k not in timing} for event in events
    ]


def test_a_growing_window_is_the_same_at_each_step_of_a_resumed_run_and_evaluations_have_the_whole():
    """Windows of 2, 4 and 6 tokens for two steps each, then 8; the run is interrupted at step 5, within a stage."""
    growing = schedule_config(window_warmup=6, window_start=2)

    def new_model():
        torch.manual_seed(0)
        return Modern(modern_config(window=8, dropout=0.1), 50)

    kinds = {"schedule": growing, "log_every": 1, "eval_every": 1}
    events, model, *_ = run(new_model(), **kinds)
    _, first, optimizer, progress = run(new_model(), interrupt=5, **kinds)
    assert (first.training_window, model.training_window) == (6, 8)
    continued = new_model()
    continued.load_state_dict(first.state_dict())
    again = optim.build(continued, adamw_config(lr=1e-2))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest, *_ = run(continued, progress, optimizer=again, **kinds)
    assert torch.equal(weights(continued), weights(model))
    assert [e.row["val/loss"] for e in rest] == [e.row["val/loss"] for e in events[6:]]
    without, *_ = run(new_model(), log_every=1, eval_every=1)
    assert without[0].row["val/loss"] == events[0].row["val/loss"]  # of the first weights, with the whole window
    assert without[1].row["train/loss"] != events[1].row["train/loss"]


def run_until(after, model=None, optimizer=None, progress=None):
    """A run whose `stop` returns true at its n-th call: (number of calls, rows recorded, progress to resume from,
    model, optimizer)."""
    n_calls = 0

    def stop():
        nonlocal n_calls
        n_calls += 1
        return n_calls >= after

    cfg = settings(micro_batch=1)
    torch.manual_seed(0)
    model = model or GPT(model_config(dropout=0.1), 50)
    optimizer = optimizer or optim.build(model, adamw_config(lr=1e-2))
    progress = progress or Progress()
    rows = []
    for event in fit(model, optimizer, NEXT_TOKEN, batches_of(cfg), cfg, CPU, progress, stop):
        if not event.row and event.checkpoint_due:
            continue
        progress = event.progress
        if not event.row:
            return n_calls, rows, event.unreported, model, optimizer
        rows.append(event.row)
    return n_calls, rows, progress, model, optimizer
