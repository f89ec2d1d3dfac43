"""Reading ahead: the same batches, earlier."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adamw_config, data_config, made_split, model_config, schedule_config, train_section

from gpt import optim
from gpt.data.batching import Batches, TrainBatches, eval_batches
from gpt.data.read_ahead import ReadAhead
from gpt.errors import UserError
from gpt.loop import fit
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN
from gpt.progress import Progress

CPU = torch.device("cpu")
SPLIT = made_split([5, 9, 17, 4, 30, 12, 8, 8, 6, 21, 7, 11] * 3)
SECONDS = 20  # that a test waits for a thread before it fails


def readers():
    """The threads that make batches just now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches of step")]


class Recorded:
    """A function that makes batches, and what it was asked for: (step, thread) for each call."""

    def __init__(self, make=lambda step: [f"batch of step {step}"]):
        self.make, self.calls = make, []

    def __call__(self, step):
        self.calls.append((step, threading.current_thread()))
        return self.make(step)


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
@pytest.mark.parametrize("kind", ["qa", "text"])
def test_batches_are_the_same_whether_and_whatever_is_read_ahead(batching, kind):
    cfg = data_config(batching=batching, kind=kind)
    here, ahead = (TrainBatches(SPLIT, cfg, 16, train_section(), seed=3) for _ in range(2))
    reader = ReadAhead(ahead.step, CPU)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):  # steps of several epochs, in any order, often others than those foretold
        asked, foretold = (int(n) for n in rng.integers(0, 3 * here.steps_per_epoch, 2))
        foretold = asked if rng.random() < 0.5 else foretold
        with reader.preparing(foretold):
            pass
        hits += asked == foretold
        for a, b in zip(here.step(asked), reader.step(asked), strict=True):
            assert all(
                torch.equal(x, y) if torch.is_tensor(x) else x == y
                for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
            )
    assert 20 < hits < 60


def test_the_next_step_is_made_in_a_thread_while_the_present_one_computes():
    computing, made = threading.Event(), threading.Event()

    def make(step):
        assert computing.wait(SECONDS)  # comes only once the block has begun
        made.set()
        return [step]

    recorded = Recorded(make)
    reader = ReadAhead(recorded, CPU)
    with reader.preparing(5):
        computing.set()
        assert made.wait(SECONDS)  # comes only while the block has not ended
    assert reader.step(5) == [5]
    ((step, thread),) = recorded.calls
    assert step == 5 and thread is not threading.current_thread() and not thread.is_alive() and not thread.daemon


def test_a_step_that_was_not_foretold_is_made_when_it_is_asked_for():
    recorded = Recorded()
    reader = ReadAhead(recorded, CPU)
    assert reader.step(7) == ["batch of step 7"]
    with reader.preparing(8):
        pass
    assert reader.step(3) == ["batch of step 3"]
    with reader.preparing(None):
        assert not readers()
    assert [step for step, _ in recorded.calls] == [7, 8, 3]
    assert recorded.calls[2][1] is threading.current_thread() is not recorded.calls[1][1]


def test_what_goes_wrong_in_the_thread_is_raised_where_the_step_is_asked_for_and_nowhere_else():
    def make(step):
        if step == 2:
            raise UserError("the disk is gone", code=5)
        return [step]

    reader = ReadAhead(make, CPU)
    with reader.preparing(2):
        pass
    assert reader.step(1) == [1]  # nobody asked for step 2
    with reader.preparing(2):
        pass
    with pytest.raises(UserError, match="the disk is gone") as caught:
        reader.step(2)
    assert caught.value.code == 5
    assert reader.step(3) == [3]


def test_no_thread_is_left_when_the_step_fails_or_is_interrupted():
    for error in (ValueError, KeyboardInterrupt, GeneratorExit, SystemExit):
        reader = ReadAhead(Recorded(), CPU)
        with pytest.raises(error), reader.preparing(1):
            raise error
        assert not readers()
        assert reader.step(1) == ["batch of step 1"]


def run(batches, stop=lambda: False, **changes):
    """The events of a small run, as an iterator, and its model."""
    cfg = SimpleNamespace(train=train_section(**changes), schedule=schedule_config(), seed=3)
    torch.manual_seed(0)
    model = GPT(model_config(dropout=0.1), 50)
    optimizer = optim.build(model, adamw_config())
    both = Batches(batches, eval_batches(SPLIT, data_config(), 16, cfg.train), None, 10, "train.max_steps")
    return fit(model, optimizer, NEXT_TOKEN, both, cfg, Machine(CPU), Progress(), stop), model


class Watched(TrainBatches):
    """Training batches that tell which steps were made, and whether in a thread of their own."""

    def step(self, step):
        self.made = [*getattr(self, "made", []), (step, threading.current_thread() in readers())]
        return super().step(step)


def test_a_run_reads_each_step_once_and_ahead_and_no_thread_is_alive_at_any_event_nor_afterwards():
    batches = Watched(SPLIT, data_config(), 16, train_section(), 3)
    for _ in run(batches)[0]:
        assert not readers()
    assert not readers()
    assert batches.made == [(0, False)] + [(step, True) for step in range(1, 10)]
    batches = Watched(SPLIT, data_config(), 16, train_section(), 3)
    list(run(batches, one_batch=True)[0])
    assert {step for step, _ in batches.made} == {0}


def test_a_run_that_is_stopped_or_left_halfway_leaves_no_thread():
    batches = TrainBatches(SPLIT, data_config(), 16, train_section(), 3)
    events, _ = run(batches)
    next(events), next(events)
    events.close()
    assert not readers()
    asked = iter(range(10**6))
    list(run(batches, stop=lambda: next(asked) > 12)[0])
    assert not readers()


def test_an_error_while_reading_ahead_ends_the_run_at_the_step_it_belongs_to():
    class Failing(TrainBatches):
        def step(self, step):
            if step == 4:
                raise OSError("the disk is gone")
            return super().step(step)

    steps = []
    with pytest.raises(OSError, match="the disk is gone"):
        for event in run(Failing(SPLIT, data_config(), 16, train_section(), 3), log_every=1)[0]:
            steps.append(event.row["step"])
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory is a GPU's")
def test_for_a_gpu_batches_are_in_page_locked_memory_and_keep_their_values():
    batches = TrainBatches(SPLIT, data_config(), 16, train_section(), 3)
    reader = ReadAhead(batches.step, torch.device("cuda"))
    with reader.preparing(0):
        pass
    for plain, pinned in zip(batches.step(0), reader.step(0), strict=True):
        assert pinned.inputs.is_pinned() and pinned.targets.is_pinned() and not plain.inputs.is_pinned()
        assert torch.equal(pinned.to(torch.device("cuda")).inputs.cpu(), plain.inputs)
