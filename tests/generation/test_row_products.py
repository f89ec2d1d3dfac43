"""The kernels that multiply a matrix of bfloat16 with one row, and how one of them is chosen."""

import time

import pytest
import torch

from gpt.generation import row_products


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("before", [True, False])
def test_onednn_is_left_as_it_was(before, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
    row_products.row_product(numbers(8, 8), numbers(8))
    assert torch.backends.mkldnn.enabled == before


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not row_products.is_faster_packed.__wrapped__()


@pytest.mark.parametrize(("own", "packed", "is_chosen"), [(2.0, 1.0, True), (1.0, 1.2, True), (1.0, 1.4, False)])
def test_the_faster_kernel_is_chosen_and_a_near_tie_falls_the_same_way_each_time(monkeypatch, own, packed, is_chosen):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no products of bfloat16")
    seconds = iter([own, packed])
    monkeypatch.setattr(row_products, "least_seconds", lambda compute: next(seconds))
    assert row_products.is_faster_packed.__wrapped__() == is_chosen


def test_a_measurement_takes_one_thread_and_leaves_their_number():
    before, seen = torch.get_num_threads(), []
    assert row_products.least_seconds(lambda: seen.append(torch.get_num_threads()) or time.sleep(0.01)) < 0.01
    assert seen == [1, 1, 1] and torch.get_num_threads() == before
