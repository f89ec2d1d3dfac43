"""What a run computes on."""

import pytest
import torch

from gpt.machine.machine import Machine

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_are_in_the_machines_type(dtype):
    a = torch.ones(2, 2)
    with Machine(CPU, dtype).autocast():
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32
