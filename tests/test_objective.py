"""What training minimises, and an objective that is not the project's own."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import adamw_config, data_config, made_split, model_config, schedule_config, train_section
from torch.nn import functional as F

from gpt import optim
from gpt.config.schema import METRIC
from gpt.data.batching import Batch, Batches, TrainBatches, eval_batches
from gpt.loop import evaluate, fit, train_step
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NextToken
from gpt.progress import Progress

CPU = Machine(torch.device("cpu"))
VAL = made_split([7, 19, 12], seed=1, name="val")


def test_evaluation_weighs_tokens_and_restores_the_training_mode():
    model = GPT(model_config(dropout=0.5), 50).train()
    batches = eval_batches(VAL, data_config(), 16, train_section(eval_tokens=1000))
    loss = evaluate(model, NextToken(), batches, CPU)[METRIC]
    assert model.training
    model.eval()
    with torch.no_grad():
        total = sum(NextToken().loss(model, batch)[0].item() for batch in batches)
    assert loss == pytest.approx(total / sum(batch.n_targets for batch in batches))


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_log2_of_its_vocabulary():
    model = GPT(model_config(), 64)
    with torch.no_grad():
        model.wte.weight.zero_()  # tied head: all logits 0, every token has probability 1/64, which is 6 bits
    batch = Batch(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1, 2, 63, 3]]), None, None, 4, 4)
    bytes_per_token = torch.ones(64, dtype=torch.long)
    assert NextToken(bytes_per_token).evaluate(model, [batch])["val/bpb"] == pytest.approx(6.0)
    bytes_per_token[3] = 2  # a token of two bytes halves the bits of each
    assert NextToken(bytes_per_token).evaluate(model, [batch])["val/bpb"] == pytest.approx(24 / 5)
    bytes_per_token[63] = 0  # the end of a text is no byte, and its bits do not count
    assert NextToken(bytes_per_token).evaluate(model, [batch])["val/bpb"] == pytest.approx(18 / 4)


class Smoothed:
    """Next-token prediction with label smoothing (Szegedy et al., 2016), and accuracy as a metric of its own."""

    def loss(self, model, batch):
        logits = model(batch.inputs, batch.positions, batch.documents).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum", label_smoothing=0.1), batch.n_targets

    def evaluate(self, model, batches):
        sums, right, n = 0.0, 0, 0
        for batch in batches:
            loss, weight = self.loss(model, batch)
            predicted = model(batch.inputs, batch.positions, batch.documents).argmax(-1)
            sums, right, n = sums + loss.item(), right + int((predicted == batch.targets).sum()), n + weight
        return {METRIC: sums / n, "val/accuracy": right / n}


def test_another_objective_needs_no_change_of_the_loop():
    """Its own loss is minimised, its own metrics are in the rows, and its loss decides which evaluation is the best."""
    cfg = SimpleNamespace(train=train_section(eval_every=10), schedule=schedule_config(), seed=3)
    data = data_config(mask="all")
    model = GPT(model_config(), 50)
    split = made_split([5, 9, 17, 4, 30, 12, 8, 8, 6, 21, 7, 11] * 3)
    batches = Batches(
        TrainBatches(split, data, 16, cfg.train, 3), eval_batches(split, data, 16, cfg.train), None, 60, "max_steps"
    )
    optimizer = optim.build(model, adamw_config(lr=1e-2))
    events = list(fit(model, optimizer, Smoothed(), batches, cfg, CPU, Progress()))
    losses = [event.row[METRIC] for event in events if METRIC in event.row]
    assert losses[-1] < math.log(49) - 0.4  # the tokens are 49 at random: what is below that has been learned by heart
    assert events[-1].row["val/accuracy"] > events[0].row["val/accuracy"] and "val/bpb" not in events[-1].row
    assert events[-1].progress.best == min(losses)
    floor = -(0.9 * math.log(0.9 + 0.1 / 50) + 0.1 * math.log(0.1 / 50) * 49 / 50)  # no model is below it
    assert min(losses) > floor - 0.1


def test_the_step_is_that_of_the_objectives_own_loss():
    """One step of plain gradient descent on a batch that is cut into micro-batches, against torch's autograd."""
    torch.manual_seed(1)
    model = GPT(model_config(), 50)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train = TrainBatches(made_split([9, 17, 4, 12] * 4), data_config(mask="all"), 16, train_section(micro_batch=1), 3)
    whole = TrainBatches(made_split([9, 17, 4, 12] * 4), data_config(mask="all"), 16, train_section(micro_batch=9), 3)
    [batch] = whole.step(0)
    loss, weight = Smoothed().loss(model, batch)
    gradients = torch.autograd.grad(loss / weight, list(model.parameters()))
    mean, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), Smoothed(), train.step(0), CPU)
    assert len(train.step(0)) > 1 and mean == pytest.approx((loss / weight).item(), rel=1e-6)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert torch.allclose(before[name] - parameter, gradient, atol=1e-6), name
