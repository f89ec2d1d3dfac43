"""Tensors in several parts. Those in the memory of several ranks: tests/machine/test_sharding.py."""

import pytest
import torch

from gpt.files import tensor_files, tensor_shards


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [([(3, 4)], [3, 4]), ([()], []), ([(3, 4), (2, 4)], [5, 4]), ([(3,), (2,)], [5]), ([(3, 4), (0, 4)], [3, 4]),
     ([(3, 4), (3, 5)], [[3, 4], [3, 5]]), ([(3, 4), ()], [[3, 4], []]), ([(3, 4), (3,)], [[3, 4], [3]])],
)  # fmt: skip
def test_the_shape_of_parts_is_that_of_the_whole_where_they_fit_below_each_other(shapes, expected):
    assert tensor_shards.shape_of(tuple(torch.ones(shape) for shape in shapes)) == expected


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (3, 3, 1), (4, 3, 0), (0, 7)])
def test_parts_are_copied_joined_and_cut_as_the_whole(sizes):
    tensor = torch.randn(7, 2)
    parts, copy = tensor.split(sizes), torch.zeros(7, 2)
    tensor_files.copy_rows(parts, copy)
    assert torch.equal(copy, tensor) and torch.equal(tensor_shards.joined(parts), tensor)
    for n_rows in (0, 2, 3, 5, 7, 9):
        assert torch.equal(tensor_shards.joined(tensor_shards.cut(parts, n_rows)), tensor[:n_rows])


def test_a_tensor_of_one_process_is_all_its_own_and_not_copied():
    tensor = torch.randn(3, 2)
    assert not tensor_shards.is_sharded(tensor) and tensor_shards.first_row(tensor) == 0
    assert tensor_shards.own_rows(tensor) is tensor and tensor_shards.joined(tensor) is tensor
    assert tensor_shards.on_cpu({"a": tensor}, is_first=False) == {}
