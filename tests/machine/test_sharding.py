"""A model that is sharded over ranks is the model of one process, in a share of its memory. Real groups, with gloo."""

import json

import pytest
from group import lines

# Steps of 3 and 1 rows, so that one rank has more rows than another, or none.
SAME = """
import json
from sharded_model import Trained
one, many = Trained(**{how}), Trained(ranks, **{how})
pairs = list(zip(one.steps(0, 20), many.steps(0, 20)))
pairs.append((one.evaluate(), many.evaluate()))
answer = {{"differences": [abs(a - b) for a, b in pairs], "fell": pairs[0][0] - one.step(0)[0]}}
answer["rows"] = ranks.gather(len(many.model.head.to_local()))
if ranks.is_first:
    print("answer " + json.dumps(answer), flush=True)
"""
# What differs in the last digit of a sum of gradients differs by more after Muon's products. So both get the very same
# gradients here.
MUON = """
from gpt import optim
answer = 0.0
for optimizer in ("muon", "muon of today"):
    one, many = Trained(optimizer=optimizer), Trained(ranks, optimizer=optimizer)
    for number in range(3):
        torch.manual_seed(number)
        for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            first = shards.first_row(b)
            b.grad = shards.sharded_like(a.grad[first : first + len(shards.own_rows(b))].clone(), b)
        for trained in (one, many):
            trained.optimizer.step()
            trained.optimizer.zero_grad()
    weights = many.whole()
    for name, tensor in one.model.state_dict().items():
        answer = max(answer, (tensor - weights[name]).abs().max().item())
if ranks.is_first:
    print("answer " + json.dumps(answer), flush=True)
"""
MEMORY = """
import sharded_model
from gpt.data.batching import Batch
from tensor_memory import Peak, held
sharded_model.VOCABULARY = 4099
tokens = torch.ones(1, 2, dtype=torch.long)
sharded_model.rows_of = lambda number: [Batch(tokens, tokens, None, None, 2, 2)] * ranks.count
answer = {}
for name, owners in (("one", ()), ("many", (ranks,))):
    before = held()
    trained = Trained(*owners, n_embd=64, n_layer=4)
    trained.step(0)
    answer[name] = [held() - before]
    with Peak((4099, 64)) as peak:
        trained.step(1)
    answer[name] += [held() - before, peak.bytes - before]
    answer["weights"] = 4 * sum(parameter.numel() for parameter in trained.model.parameters())
    trained = None
answer["largest group"] = 4 * 64 * (4099 + 16)
if ranks.is_first:
    print("answer " + json.dumps(answer), flush=True)
"""
# The second step takes both ranks 4 s, in the third one of them takes 8: that is more than the limit, and less than
# three times the longest step.
SLOW = """
import time
many = Trained(ranks)
block = many.model.blocks[0]
forward, waits = block.forward, [0.0]
def slow(*arguments, **more):
    time.sleep(waits[0])
    waits[0] = 0.0
    return forward(*arguments, **more)
block.forward = slow
for number, waits[0] in enumerate((0.0, 4.0, 8.0 * ranks.rank)):
    many.step(number)
if ranks.is_first:
    print("answer " + json.dumps(number), flush=True)
"""
# Of the first step, which has two rows for one of the ranks.
GRADIENTS = """
def kept(trained):
    found = []
    trained.optimizer.step = lambda: found.extend(p.grad.clone() for p in trained.model.parameters())
    trained.step(0)
    return [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in found]
one, many = (kept(Trained(*owners, dtype=torch.bfloat16)) for owners in ((), (ranks,)))
answer = max(((a - b).norm() / a.norm()).item() for a, b in zip(one, many, strict=True))
if ranks.is_first:
    print("answer " + json.dumps(answer), flush=True)
"""
IMPORTS = "import json\nfrom gpt.files import tensor_shards as shards\nfrom sharded_model import Trained\n"


def answers(folder, n, body, limit=20.0):
    code, output = lines(folder, n, body, limit=limit, sharded=True)
    assert code == 0, output
    return [json.loads(line.removeprefix("answer ")) for line in output.splitlines() if line.startswith("answer ")]


@pytest.mark.exhaustive
def test_two_ranks_train_and_evaluate_as_one_process_does_and_muon_makes_the_same_of_the_same(tmp_path):
    same, muon = answers(tmp_path, 2, SAME.format(how={}) + IMPORTS + MUON)
    assert max(same["differences"]) < 1e-5 and same["fell"] > 0.01
    assert same["rows"] == [129, 128]  # of 257
    assert muon < 1e-6


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    "how",
    [{}, {"checkpointing": True}, {"optimizer": "sgd"}, {"adapters": True}, {"tie_weights": False},
     {"adapters": True, "checkpointing": True}, {"family": "modern"},
     {"family": "modern", "adapters": True, "checkpointing": True}, {"family": "modern", "qk_norm": "before_rotation"},
     {"ema": 0.8}],
    ids=str,
)  # fmt: skip
def test_everything_that_is_trained_is_trained_as_by_one_process(tmp_path, n, how):
    (answer,) = answers(tmp_path, n, SAME.format(how=how))
    assert max(answer["differences"]) < 1e-5
    assert answer["rows"] == {2: [129, 128], 4: [65, 65, 65, 62]}[n]


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["optimizer='muon', ", "", "family='modern', "])
def test_what_is_rounded_to_bfloat16_differs_by_no_more_than_rounding(tmp_path, how):
    """As much as one process differs from itself when the rows of a step are added up in another order."""
    (answer,) = answers(tmp_path, 2, SAME.format(how=f"dict({how}dtype=torch.bfloat16)"))
    assert max(answer["differences"]) < 2e-3


@pytest.mark.exhaustive
def test_gradients_of_products_in_bfloat16_are_added_up_in_float32(tmp_path):
    """In bfloat16 the sum would differ by 2^-9, or 2e-3."""
    (answer,) = answers(tmp_path, 2, IMPORTS + GRADIENTS)
    assert answer < 1e-6


@pytest.mark.exhaustive
def test_four_ranks_keep_a_quarter_each_and_at_most_two_copies_of_the_largest_group(tmp_path, record_property):
    (answer,) = answers(tmp_path, 4, IMPORTS + MEMORY)
    weights, group = answer["weights"], answer["largest group"]
    (one, again, _), (many, many_again, peak) = answer["one"], answer["many"]
    assert one == pytest.approx(3 * weights, rel=0.01)  # and the two moments of AdamW
    assert many <= 0.26 * one and (again, many_again) == (one, many)
    assert peak <= 0.30 * (one + weights) + 2 * group  # one process has its gradients too
    share, peaks = many / one, (peak - 2 * group) / (one + weights)
    record_property("count", f"4 ranks: {share:.3f} x the state of one process, at the peak {peaks:.3f} x and 2 groups")


@pytest.mark.exhaustive
def test_a_rank_may_take_three_times_as_long_as_the_longest_step_so_far(tmp_path):
    assert answers(tmp_path, 2, IMPORTS + SLOW, limit=4.0) == [2]
