"""The running mean of the weights."""

import pytest
import torch

from gpt.optimizers.running_mean import RunningMean, in_place


def test_it_is_the_mean_of_the_weights_after_each_step_with_weights_that_fall_by_the_decay():
    weights, mean = torch.nn.Parameter(torch.full((2,), 100.0)), None
    mean = RunningMean([weights], 0.9)  # of the first weights nothing is kept
    seen = []
    for step in range(5):
        weights.data.fill_(step**2)
        mean.step()
        seen.append(step**2)
        parts = [0.9 ** (step - s) for s in range(step + 1)]
        expected = sum(w * p for w, p in zip(seen, parts, strict=True)) / sum(parts)
        assert mean.state[weights]["mean"].tolist() == pytest.approx([expected, expected])


def test_a_model_gets_it_and_its_own_weights_back_to_the_last_bit_also_after_an_error():
    weights = torch.nn.Parameter(torch.randn(100))
    mean = RunningMean([weights], 0.5)
    mean.step()
    with torch.no_grad():
        weights.add_(torch.randn(100))
    before = weights.detach().clone()
    with pytest.raises(KeyError), in_place(mean):
        assert torch.equal(weights, mean.state[weights]["mean"]) and not torch.equal(weights, before)
        raise KeyError
    assert torch.equal(weights, before)


def test_before_the_first_step_there_is_none_and_the_weights_stay():
    weights = torch.nn.Parameter(torch.ones(2))
    with in_place(RunningMean([weights], 0.5)):
        assert weights.tolist() == [1.0, 1.0]
