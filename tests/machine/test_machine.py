"""One process computes all of a step."""

import pytest
import torch

from gpt.machine.machine import Machine, Ranks

CPU = torch.device("cpu")


def test_one_process_has_all_micro_batches_and_its_sums_are_the_whole():
    gradient = torch.ones(3)
    ranks = Ranks()
    ranks.add([gradient])
    assert (ranks.share([1, 2, 3]), ranks.total(7)) == ([1, 2, 3], 7) and gradient.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_are_in_the_machines_type(dtype):
    a = torch.ones(2, 2)
    with Machine(CPU, dtype).autocast():
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32
