"""What training minimises, and an objective that is not the project's own."""

import math
from dataclasses import asdict, replace
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, data_config, made_split, model_config, train_section
from test_launch import composed
from test_train import SMALL, in_directory
from torch.nn import functional as F

from gpt.config import launch
from gpt.config.fields import BelowOne, section
from gpt.config.schema import METRIC, TrainConfig
from gpt.data.batching import Batch, TrainBatches, eval_batches
from gpt.errors import UserError
from gpt.files.jsonl import read_rows
from gpt.loop import evaluate, train_step
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN, OBJECTIVES
from train import train

CPU = Machine(torch.device("cpu"))
VAL = made_split([7, 19, 12], seed=1, name="val")


def test_evaluation_weighs_tokens_and_restores_the_training_mode():
    model = GPT(model_config(dropout=0.5), 50).train()
    batches = eval_batches(VAL, data_config(), 16, train_section(eval_tokens=1000))
    loss = evaluate(model, NEXT_TOKEN, batches, CPU)[METRIC]
    assert model.training
    model.eval()
    with torch.no_grad():
        total = sum(NEXT_TOKEN.loss(model, batch)[0].item() for batch in batches)
    assert loss == pytest.approx(total / sum(batch.n_targets for batch in batches))


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_log2_of_its_vocabulary():
    model = GPT(model_config(), 64)
    with torch.no_grad():
        model.wte.weight.zero_()  # tied head: all logits 0, every token has probability 1/64, which is 6 bits
    batch = Batch(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1, 2, 63, 3]]), None, None, 4, 4)
    assert "val/bpb" not in NEXT_TOKEN.evaluate(model, [batch])
    for lengths, expected in [
        ([1, 1, 1, 1], 6.0),
        ([1, 1, 1, 2], 24 / 5),  # a token of two bytes halves the bits of each
        ([1, 1, 0, 2], 18 / 4),  # the end of a text is no byte, and its bits do not count
    ]:
        measured = replace(batch, target_bytes=torch.tensor(lengths))
        assert NEXT_TOKEN.evaluate(model, [measured])["val/bpb"] == pytest.approx(expected)


def test_batches_of_validation_know_the_bytes_of_each_target():
    bytes_per_token = np.random.default_rng(5).integers(0, 9, 50)
    for batch in eval_batches(VAL, data_config(), 16, train_section(), bytes_per_token):
        assert batch.target_bytes.tolist() == bytes_per_token[batch.targets[batch.targets >= 0]].tolist()


@section
class Smoothed:
    """Next-token prediction with label smoothing (Szegedy et al., 2016), and accuracy as a metric of its own."""

    name: Literal["smoothed"]
    smoothing: BelowOne

    def loss(self, model, batch):
        logits = model(batch.inputs, batch.positions, batch.documents).flatten(0, 1)
        targets = batch.targets.flatten()
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.smoothing), batch.n_targets

    def evaluate(self, model, batches):
        sums, right, n = 0.0, 0, 0
        for batch in batches:
            loss, weight = self.loss(model, batch)
            predicted = model(batch.inputs, batch.positions, batch.documents).argmax(-1)
            sums, right, n = sums + loss.item(), right + int((predicted == batch.targets).sum()), n + weight
        return {METRIC: sums / n, "val/accuracy": right / n}


SMOOTHED = Smoothed("smoothed", 0.1)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """What train.py gets where gpt/objective.py and conf/objective/ have this objective, too."""
    monkeypatch.setitem(OBJECTIVES, "smoothed", Smoothed)
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "conf" / "objective" / "smoothed.yaml").write_text("name: smoothed\nsmoothing: 0.1\n")

    def make(*changes):
        search = f"hydra.searchpath=[file://{ROOT},file://{tmp_path / 'conf'}]"
        data = ["data.tokenizer=bytes", f"data.prepared_dir={tmp_path / 'data'}", "wandb.mode=disabled"]
        return in_directory(launch.validated(composed(search, *SMALL, *data, *changes), TrainConfig), tmp_path / "run")

    return make


def test_another_objective_is_a_class_and_a_file_of_values(settings, tmp_path):
    """Its own loss is minimised, its own metrics are in the rows, and its loss decides which evaluation is the best."""
    cfg = settings("objective=smoothed", "optimizer.lr=1e-2", "train.max_steps=20")
    best = train(cfg)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if METRIC in row]
    losses = [row[METRIC] for row in rows]
    assert best == min(losses) < losses[0] and rows[-1]["val/accuracy"] > rows[0]["val/accuracy"]
    assert not any("val/bpb" in row for row in rows)
    floor = -(0.9 * math.log(0.9 + 0.1 / 257) + 0.1 * math.log(0.1 / 257) * 256 / 257)  # no model is below it
    assert best > floor
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["objective"] == asdict(cfg.objective)


def test_wrong_settings_of_an_objective_are_reported_with_all_others(settings):
    with pytest.raises(UserError) as caught:
        settings("objective=smoothed", "objective.smoothing=1.5", "seed=-1")
    assert "objective.smoothing=1.5: input should be less than 1" in str(caught.value)
    assert "seed=-1" in str(caught.value)


def test_the_step_is_that_of_the_objectives_own_loss():
    """One step of plain gradient descent on a batch that is cut into micro-batches, against torch's autograd."""
    torch.manual_seed(1)
    model = GPT(model_config(), 50)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train = TrainBatches(made_split([9, 17, 4, 12] * 4), data_config(mask="all"), 16, train_section(micro_batch=1), 3)
    whole = TrainBatches(made_split([9, 17, 4, 12] * 4), data_config(mask="all"), 16, train_section(micro_batch=9), 3)
    [batch] = whole.step(0)
    loss, weight = SMOOTHED.loss(model, batch)
    gradients = torch.autograd.grad(loss / weight, list(model.parameters()))
    mean, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), SMOOTHED, train.step(0), CPU)
    assert len(train.step(0)) > 1 and mean == pytest.approx((loss / weight).item(), rel=1e-6)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert torch.allclose(before[name] - parameter, gradient, atol=1e-6), name
