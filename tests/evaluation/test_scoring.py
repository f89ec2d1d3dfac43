"""Likelihoods of texts: each target once, in windows, and the same as transformers computes."""

import math

import numpy as np
import pytest
import torch
from conftest import made_split, model_config

from gpt.data.batching import Split
from gpt.errors import UserError
from gpt.evaluation import scoring
from gpt.model import GPT

VOCABULARY, CONTEXT = 50, 16
SIZES = np.arange(VOCABULARY) % 4  # bytes of each token; some have none


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(model_config(context_length=CONTEXT), VOCABULARY).eval()


def by_hand(model, ids, first, stride):
    """The nats of each token from `first` on, in windows of CONTEXT inputs that move by `stride`."""
    nats, target, end = [], first, len(ids)
    while target < end:
        last = min(end - 1, max(target - 1 + stride, CONTEXT))
        start = max(0, last - CONTEXT)
        logs = model(torch.tensor([ids[start:last].tolist()])).log_softmax(-1)[0]
        nats += [-logs[t - start - 1, ids[t]].item() for t in range(target, last + 1)]
        target = last + 1
    return nats


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_every_target_of_a_long_document_is_scored_once_with_any_stride(model, stride):
    split = made_split([70], prompt=0, vocab_size=VOCABULARY)
    segments = scoring.windows(split, CONTEXT, "all", stride)
    rows = scoring.score(model, split, segments, range(len(segments.start)), SIZES)
    expected = by_hand(model, split.ids.astype(int), 1, stride)
    assert sum(row["tokens"] for row in rows) == len(expected) == 69
    assert sum(row["nats"] for row in rows) == pytest.approx(sum(expected), abs=1e-4)
    assert len(rows) == 1 + math.ceil((69 - CONTEXT) / stride)


def test_bytes_and_nats_of_text_leave_out_tokens_without_bytes(model):
    split = made_split([12], prompt=0, vocab_size=VOCABULARY)
    segments = scoring.windows(split, CONTEXT, "all")
    [row] = scoring.score(model, split, segments, [0], SIZES)
    nats, targets = np.array(by_hand(model, split.ids.astype(int), 1, 8)), split.ids[1:]
    assert row["bytes"] == SIZES[targets].sum()
    assert row["text nats"] == pytest.approx(nats[SIZES[targets] > 0].sum(), abs=1e-5)


def test_documents_have_the_same_nats_whichever_are_scored_together(model):
    split = made_split([30, 9, 14, 40], prompt=4, vocab_size=VOCABULARY)
    together = scoring.of_documents(model, split, [3, 1, 0], CONTEXT, SIZES, slots=64)
    for number, row in zip([3, 1, 0], together, strict=True):
        [alone] = scoring.of_documents(model, split, [number], CONTEXT, SIZES, slots=16)
        start, response, end = split.documents[number]
        assert row["tokens"] == alone["tokens"] == end - response
        assert row["nats"] == pytest.approx(alone["nats"], abs=1e-4)
        assert row["nats"] == pytest.approx(sum(by_hand(model, split.ids[start:end].astype(int), 4, 8)), abs=1e-4)


def test_groups_hold_every_window_once_and_keep_to_their_size():
    split = made_split([5, 50, 9, 16, 31], prompt=0, vocab_size=VOCABULARY)
    segments = scoring.windows(split, CONTEXT, "all")
    groups = scoring.grouped(segments, 40)
    assert sorted(i for group in groups for i in group) == list(range(len(segments.start)))
    assert all(len(group) * segments.lengths[group].max() <= 40 for group in groups)


def test_a_loss_that_is_not_finite_is_a_numerical_stop():
    broken = GPT(model_config(context_length=CONTEXT), VOCABULARY)
    with torch.no_grad():
        broken.wte.weight.fill_(3e38)
    split = Split(np.arange(1, 9, dtype=np.uint16), np.array([[0, 0, 8]]), "test")
    with pytest.raises(UserError, match="losses are not finite") as caught:
        scoring.score(broken, split, scoring.windows(split, CONTEXT, "all"), [0], SIZES)
    assert caught.value.code == 4
