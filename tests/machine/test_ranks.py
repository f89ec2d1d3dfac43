"""One process has all of a step, of an evaluation and of everything else; nothing is exchanged."""

import subprocess
import sys

import torch
from conftest import ROOT
from torch import nn

from gpt.machine.ranks import ALONE, COUNTS, EVALUATION, Planned, Ranks, Shared, parts


def test_one_process_has_all_rows_and_its_sums_are_the_whole():
    ranks, layer = Ranks(), nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)  # the bias has none
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.total([7, 0.5], COUNTS) == [7, 0.5]
    [gradient] = ranks.gradients(torch.tensor(2.0), layer.parameters())
    assert gradient is layer.weight.grad and gradient.tolist() == [[1.0, 1.0]] and layer.bias.grad is None


def test_one_process_is_the_first_does_all_by_itself_and_stops_when_it_wishes_to():
    wishes = iter([0, 15])
    assert ALONE.is_first and ALONE.first(lambda: {1}) == {1} and ALONE.in_turn(lambda: "x") == "x"
    assert [ALONE.wish(lambda: next(wishes)), ALONE.wish(lambda: next(wishes))] == [0, 15] and not ALONE.stops


def test_ranks_without_a_row_are_counted_with_the_number_of_tokens_that_gives_them_one():
    assert ALONE.idle(1, 128) == Planned(2, False).idle(2, 128) == ""
    text = "3 of 4 ranks have nothing to compute in steps of 1 row; start 1, or set train.tokens_per_step=512 or more"
    assert Planned(4, False).idle(1, 128) == text


class Second(Ranks):
    """The second of two ranks; the first has 10 more of everything."""

    rank, count = 1, 2

    def total(self, numbers, of):
        assert of == EVALUATION
        return [number + 10 for number in numbers]


def test_ranks_take_turns_with_the_batches_of_an_evaluation_that_shares_them():
    shared = Shared([1, 2, 3, 4, 5], Second(), iter)
    batches, total = parts(shared)
    assert list(batches) == [2, 4] and total([6, 2]) == [16, 12]
    assert list(shared) == [1, 2, 3, 4, 5]  # what an objective gets that knows nothing of ranks


def test_batches_that_are_not_shared_are_all_there_and_their_sums_are_the_whole():
    batches, total = parts([1, 2])
    assert batches == [1, 2] and total([3, 4]) == [3, 4]


def test_one_process_imports_nothing_of_process_groups():
    code = "import sys, train, gpt.runs.run, gpt.loop; print('gpt.machine.process_group' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
