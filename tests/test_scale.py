"""The cost model of many GPUs (experiments/scale) says what can be worked out by hand."""

import importlib.util
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def cost_model():
    spec = importlib.util.spec_from_file_location("cost_model", ROOT / "experiments" / "scale" / "cost_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_model"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cost_model"]


def test_a_line_of_the_table_is_that_of_a_calculation_by_hand(cost_model, monkeypatch, capsys):
    """GPT-2 small on one machine of eight H100, ddp."""
    monkeypatch.setattr(sys, "argv", ["cost_model.py", "--models", "small", "--gpus", "8"])
    cost_model.main()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| small, ddp | 8 |"))
    in_blocks = 12 * 12 * 768**2  # 12 blocks, each with weights of 3 + 1 + 4 + 4 squares of the width
    for_a_token = 6 * (in_blocks + 50257 * 768) + 12 * 12 * 1024 * 768  # head included; attention to 1,024 places
    compute = 32768 * for_a_token / (0.36 * 989e12)
    gradients = 4 * 124_439_808  # bytes
    exchange = 2 * 7 / 8 * gradients / 370e9 + 8 * 14 * 3.4e-6  # in 8 buckets of 64 MiB, 14 hops each
    memory = (28 * 124_439_808 + 4 * gradients) / 2.7e12
    step = compute + memory + exchange + 7 * 30e-6
    found = [float(cell) for cell in line.split("|")[3:8]]
    assert found == pytest.approx([1e3 * t for t in (compute, memory, exchange, 7 * 30e-6, step)], abs=0.051)
    alone = compute + 28 * 124_439_808 / 2.7e12
    assert float(line.split("|")[9]) == pytest.approx(alone / step, abs=0.0051)


def test_between_machines_a_gpu_exchanges_the_part_of_its_machine_that_is_its_own(cost_model):
    """16 GPUs on two machines: 7/8 of the bytes by NVLink, half of an eighth by InfiniBand; there and back in an
    all-reduce."""
    cluster = cost_model.Cluster(nvlink_hop=0.0, infiniband_hop=0.0)
    seconds = 7 / 8 / cluster.nvlink + 1 / 2 / 8 / cluster.infiniband
    assert cluster.gather(1.0, 16) == pytest.approx(seconds)
    assert cluster.all_reduce(1.0, 16) == pytest.approx(2 * seconds)
    assert cluster.gather(1.0, 1) == cluster.all_reduce(1.0, 1) == 0.0
