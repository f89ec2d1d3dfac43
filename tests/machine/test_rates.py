"""How fast this machine computes a model, measured with a part of it."""

from dataclasses import replace

import pytest
import torch
from conftest import finetune_config
from test_conf import loaded
from test_train import SMALL

from gpt.machine import rates
from gpt.machine.machine import Machine

BFLOAT16 = Machine(torch.device("cpu"), torch.bfloat16, {"micro_batch": 2})


@pytest.mark.parametrize("family", [SMALL, [*SMALL, "model=modern_tiny", "model.head_size=4", "model.window=8"]])
def test_blocks_head_and_memory_do_more_than_a_million_a_second_even_where_bfloat16_is_emulated(family):
    cfg = loaded(*family)
    frozen = replace(cfg, finetune=finetune_config(name="last_blocks", n_blocks=1))
    assert min(vars(rates.measure(cfg, 257, 20, BFLOAT16)).values()) > 1e6
    assert rates.measure(frozen, 257, 20, BFLOAT16).block_flops > 1e6


def test_a_pass_that_takes_long_is_measured_with_fewer_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr(rates, "duration", lambda work, device: seen.append(work()) or 10.0)
    device = torch.device("cpu")
    operations = 10.0 * rates.head_rate(4, 100, True, 1000, device, torch.float32)
    assert operations == 6 * 8 * 4 * 100 and len(seen) == 4  # twice to see how long it takes, and twice to measure


def test_a_model_of_which_not_even_two_blocks_fit_has_no_rates():
    cfg = loaded("model=xl", "model.n_embd=200000", "model.n_head=2000")
    machine = Machine(torch.device("cpu"), environment={"micro_batch": 1})
    assert rates.measure(cfg, 50257, 1024, machine) is None


def test_reading_memory_is_measured_each_time(monkeypatch):
    seen = []
    monkeypatch.setattr(rates, "duration", lambda work, device: seen.append(work()) or 0.25)
    assert [rates.read_rate(torch.device("cpu")) for _ in range(2)] == [2**28 / 0.25] * 2
    assert [float(total) for total in seen] == [2**26] * 4  # all of it has been read, twice each time
    assert rates.read_rate(torch.device("cpu"), 4000) == 4000 / 0.25 and float(seen[-1]) == 1000
