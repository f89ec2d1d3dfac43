"""Probabilities are mixed from those of the head and from counts in the context, as counting by hand gives them."""

import math
from dataclasses import replace

import pytest
import torch

from gpt.data.batching import IGNORE
from gpt.loss import cross_entropy
from gpt.modern import Modern
from gpt.parts.copying import Copying, ngram_matches
from tests.conftest import modern_config

VOCABULARY = 7
IDS = [1, 2, 3, 1, 2, 4, 1, 2]


def causal(n):
    return torch.ones(1, n, n, dtype=torch.bool).tril()


def test_columns_match_whose_last_tokens_are_those_of_the_position():
    matches = ngram_matches(torch.tensor([IDS]), causal(8), 2)[0]  # (T, N, S)
    assert matches[7, 0].all()  # after no token: all
    assert matches[7, 1].nonzero()[:, 0].tolist() == [2, 5]  # after 2: the 3 and the 4
    assert matches[7, 2].nonzero()[:, 0].tolist() == [2, 5]  # after 1, 2: the same
    assert matches[6, 1].nonzero()[:, 0].tolist() == [1, 4]  # after 1: twice a 2
    assert not matches[6, 2].any()  # 4, 1 is new
    assert not matches[0, 1:].any() and not matches[5, 1:].any()


def test_only_what_a_position_sees_is_counted():
    """Two documents in a row: the second one begins with column 3."""
    numbers = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    matches = ngram_matches(torch.tensor([IDS]), causal(8) & (numbers[:, None] == numbers), 2)[0]
    assert matches[7, 0].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]
    assert matches[7, 1].nonzero()[:, 0].tolist() == [5]
    assert matches[7, 2].nonzero()[:, 0].tolist() == [5]
    assert not matches[4, 1].any()  # 2 stood in the first document only
    assert not matches[3, 1:].any()


@torch.no_grad()
def test_probabilities_are_the_shares_of_the_head_and_of_the_counts():
    """At the start a stream does not change the shares: softmax of 0, -4, -1 and 1 where all have a match."""
    copying = Copying(4, 2)
    copies = copying(torch.randn(1, 8, 4), torch.tensor([IDS]), causal(8))
    logits = torch.randn(1, 8, VOCABULARY)
    total = 1 + math.exp(-4) + math.exp(-1) + math.exp(1)
    expected = logits[0, 7].softmax(0) / total
    for token in IDS:
        expected[token] += math.exp(-4) / total / 8
    expected[[3, 4]] += (math.exp(-1) + math.exp(1)) / total / 2
    torch.testing.assert_close(copies.mixed(logits)[0, 7].exp(), expected)
    torch.testing.assert_close(copies[:, -1].mixed(logits[:, -1])[0].exp(), expected)
    # What has no match leaves its share to the others.
    expected = logits[0, 0].softmax(0) / (1 + math.exp(-4))
    expected[IDS[0]] += math.exp(-4) / (1 + math.exp(-4))
    torch.testing.assert_close(copies.mixed(logits)[0, 0].exp(), expected)


@torch.no_grad()
def test_the_loss_is_that_of_the_mixed_probabilities():
    torch.manual_seed(0)
    model = Modern(modern_config(copy_order=2), VOCABULARY).eval()
    model.copying.gate.weight.normal_()
    ids = torch.randint(VOCABULARY, (3, 12))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    hidden = model.hidden(inputs)
    kept, added = model.copies(hidden, inputs).of(targets)
    losses = cross_entropy(hidden.flatten(0, 1), model.head, targets.flatten(), None, (kept.flatten(), added.flatten()))
    logs = model(inputs)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(3, 11))
    torch.testing.assert_close(losses, -logs.gather(-1, targets[..., None]).flatten())


def test_a_position_that_is_not_scored_gets_nothing_from_the_counts():
    copies = Copying(4, 1)(torch.zeros(1, 8, 4), torch.tensor([IDS]), causal(8))
    _, added = copies.of(torch.full((1, 8), IGNORE))
    assert (added < -60).all()


def test_shares_are_learned_from_the_stream():
    """A stream of ones wherever the last two tokens came before: there the counts are right, elsewhere never."""
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 3]])
    copying, seen = Copying(1, 1), causal(10)
    is_right = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 1, 0])
    optimizer = torch.optim.Adam(copying.parameters(), lr=0.1)
    for _ in range(100):
        kept, added = copying(is_right[None, :, None], ids[:, :-1], seen).of(ids[:, 1:])
        loss = -torch.logaddexp(kept - math.log(VOCABULARY), added).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = copying(is_right[None, :, None], ids[:, :-1], seen).shares.exp()[0]
    assert shares[8, 2] > 0.9 and shares[9, 2] < 0.7 * shares[8, 2]


@pytest.mark.parametrize("order", [0, 3])
def test_any_order_trains(order):
    torch.manual_seed(0)
    model = Modern(replace(modern_config(), copy_order=order), VOCABULARY)
    model(torch.tensor([IDS])).gather(-1, torch.tensor([IDS])[..., None]).sum().neg().backward()
    assert model.copying.gate.weight.grad.isfinite().all() and model.copying.gate.weight.grad.any()
