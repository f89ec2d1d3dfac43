"""What a run is said to cost against what is counted and measured. Its memory: test_memory.py."""

from dataclasses import replace

import pytest
import torch
from conftest import finetune_config
from test_conf import loaded
from test_train import SMALL

from gpt.machine import cost
from gpt.machine.machine import Machine
from gpt.machine.ranks import Planned
from gpt.machine.rates import Rates

CPU = Machine(torch.device("cpu"), environment={"micro_batch": 1})


def test_the_operations_of_gpt2_small_are_six_times_its_matrices_and_attention():
    cfg = loaded("model=small")
    count = cost.count_operations(cfg, 50257, CPU)
    checkpointing = replace(cfg, train=replace(cfg.train, gradient_checkpointing=True))
    again = cost.count_operations(checkpointing, 50257, CPU)
    assert count.blocks == 6 * 84_934_656 + 12 * 12 * 1024 * 768
    assert count.head == again.head == 6 * 38_597_376
    assert (count.forward / count.blocks, again.blocks / count.blocks) == (pytest.approx(1 / 3), pytest.approx(4 / 3))


def test_time_grows_with_steps_evaluations_and_samples_and_shrinks_with_speed():
    cfg = loaded(*SMALL)
    work, slow = cost.Work.expected(cfg.train), Rates(1e9, 1e9, 1e9)

    def seconds(steps=100, rates=slow, **changes):
        changed = replace(cfg, train=replace(cfg.train, **changes))
        return cost.run_seconds(changed, work, steps, rates, 50257, CPU)

    assert seconds(steps=200) > seconds() > seconds(rates=Rates(2e9, 2e9, 2e9))
    assert seconds(eval_every=1) > seconds() > seconds(sample_every=None)


def test_the_rank_with_most_rows_decides_how_long_ranks_take():
    cfg = loaded(*SMALL, "train.tokens_per_step=320", "train.eval_every=1000", "train.sample_every=null")
    work, rates = cost.Work.expected(cfg.train), Rates(1e9, 1e9, 1e12)
    rows = cfg.train.rows_per_step(cfg.model.context_length)

    def steps(*ranks):
        machine = replace(CPU, ranks=Planned(*ranks))
        return (cost.run_seconds(cfg, work, n, rates, 50257, machine) for n in (1000, 2000))

    first, second = steps(1, False)
    whole = second - first
    assert rows == 5
    for n, most in ((2, 3), (5, 1), (8, 1)):
        first, second = steps(n, False)
        assert (second - first) / whole == pytest.approx(most / 5, rel=0.01)


def test_frozen_weights_save_operations_and_time():
    cfg = loaded("model=small", "train.max_steps=100")
    work, rates = cost.Work.expected(cfg.train), Rates(1e12, 1e12, 1e10)
    adapters, last_block = finetune_config(name="lora"), finetune_config(name="last_blocks", n_blocks=1)
    runs = [replace(cfg, finetune=chosen) for chosen in (None, adapters, last_block)]
    operations = [cost.run_operations(run, 50257, 100, CPU) for run in runs]
    seconds = [cost.run_seconds(run, work, 100, rates, 50257, CPU) for run in runs]
    assert operations[0] > operations[1] > operations[2] and seconds[0] > seconds[1] > seconds[2]
    assert operations[1] / operations[0] == pytest.approx(2 / 3, abs=0.05)  # forward and through the weights: 4 of 6
