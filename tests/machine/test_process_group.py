"""What several processes exchange, in real groups with gloo."""

import json

import pytest
from group import lines

EXCHANGES = """
from torch import nn
from gpt.machine.ranks import COUNTS, EVALUATION
r = ranks.rank
answers = {"rows": ranks.share(list(range(3))), "total": ranks.total([r, 1, 0.1], COUNTS), "seed": ranks.seed}
answers["first"] = ranks.first(lambda: {"by": r})
asked = []
ranks.in_turn(lambda: asked.append(r))
a, b, c = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
if r == 0:  # rank 1 has no rows, and no rank anything for c
    a.grad, b.grad = torch.ones(2), torch.tensor([1.0, 2.0, 3.0])
loss = torch.tensor(float(r + 1))
answers["gradients"] = [g.tolist() for g in ranks.gradients(loss, [a, b, c])]
answers["loss"], answers["none"], answers["asked"] = loss.item(), c.grad is None, asked
process_group.BUCKET = 8  # bytes: the larger ones go alone
a.grad = b.grad = None
if r == 1:
    a.grad, b.grad = torch.ones(2), torch.tensor([1.0, 2.0, 3.0])
answers["unbucketed"] = [g.tolist() for g in ranks.gradients(loss, [a, b, c])]
weights = torch.full((2,), float(r))
ranks.spread([weights])
answers["spread"] = weights.tolist()
before = ranks.wish(lambda: 9)
ranks.watch(lambda: 15 * r)
unasked = ranks.wish(lambda: 9)
ranks.total([1], EVALUATION)
answers["wishes"] = [before, unasked, ranks.wish(lambda: 9), ranks.stops]
import json
print("answer " + json.dumps(answers), flush=True)
"""


def test_two_ranks_add_up_what_each_has_and_know_what_the_first_knows(tmp_path):
    code, output = lines(tmp_path, 2, EXCHANGES)
    assert code == 0, output
    answers = [json.loads(line.removeprefix("answer ")) for line in output.splitlines() if line.startswith("answer ")]
    first, second = sorted(answers, key=lambda answer: answer["rows"])
    assert (first.pop("rows"), second.pop("rows")) == ([0], [1, 2])
    assert (first.pop("seed"), second.pop("seed")) == ([], [1])
    assert (first.pop("asked"), second.pop("asked")) == ([0], [1])
    assert first == second and first == {
        "total": [1, 2, 0.2], "first": {"by": 0}, "loss": 3.0, "none": True, "spread": [0.0, 0.0],
        "gradients": [[1.0, 1.0], [1.0, 2.0, 3.0]], "unbucketed": [[1.0, 1.0], [1.0, 2.0, 3.0]],
        "wishes": [0, 0, 15, True],
    }  # fmt: skip
    assert isinstance(first["total"][0], int)


@pytest.mark.exhaustive
def test_an_error_of_the_first_rank_is_raised_in_all_of_them(tmp_path):
    body = """
from gpt.errors import UserError
def fail():
    raise UserError("no", "there", "do it", 6)
try:
    ranks.first(fail)
except UserError as error:
    print("answer", error, error.code, flush=True)
"""
    code, output = lines(tmp_path, 2, body)
    assert code == 0 and output.count("answer no (there); do it 6") == 2, output


@pytest.mark.exhaustive
def test_values_that_differ_are_named_by_the_rank_that_has_them(tmp_path):
    body = """
ranks.check_same({"a": 1, "b": 2}, "settings are")
try:
    ranks.check_same({"a": 1, "b": 2 if ranks.rank == 0 else 3}, "its settings are")
except Exception as error:
    print("answer", ranks.rank, type(error).__name__, error, flush=True)
    import os, time; time.sleep(1); os._exit(0)
"""
    code, output = lines(tmp_path, 2, body)
    assert "answer 1 UserError its settings are other than those of rank 0: b 3 != 2 (rank 1)" in output, output
    assert code == 0 and "answer 0 GroupFault" in output, output


LATE = """
from torch import nn
import time
from gpt.machine.ranks import COUNTS
weight, waits = nn.Parameter(torch.zeros(2)), iter({waits})
{before}
def step():
    ranks.total([1], COUNTS)
    if ranks.rank == 1:
        time.sleep(next(waits))
    weight.grad = torch.ones(2)
    ranks.gradients(torch.tensor(1.0), [weight])
try:
    for number in range(2):
        step()
        print("answer", ranks.rank, number, flush=True)
except Exception as error:
    print("answer", ranks.rank, error, flush=True)
    import os; os._exit(0)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("waits", "before", "last"),
    [([4, 0], "", "1"), ([0, 4], "", "rank 1 does not answer"), ([0, 4], "ranks.expect_compiling()", "1")],
    ids=["the first step", "the second step", "the second step of a compiled model"],
)
def test_a_step_has_a_limit_of_time_once_one_is_done(tmp_path, waits, before, last):
    """Of 2 s here, and of minutes where a rank may have to compile."""
    _, output = lines(tmp_path, 2, LATE.format(waits=waits, before=before), limit=2.0)
    answers = [line for line in output.splitlines() if line.startswith("answer 0")]
    assert answers[-1].startswith(f"answer 0 {last}"), output
