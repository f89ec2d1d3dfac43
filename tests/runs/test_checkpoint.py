"""Checkpoints: published whole, verified, restored exactly, and never executed."""

import math
import shutil

import pytest
import torch
from conftest import ROOT, adamw_config, model_config, muon_config

from gpt import optim
from gpt.config.optimizers import SGDConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint
from gpt.runs.manifest import Identity
from gpt.weights import loading

CPU = torch.device("cpu")
IDENTITY = Identity(model_config(), 257, "bytes", "alpaca")
MUON = muon_config(momentum=0.9)
SGD = SGDConfig(name="sgd", lr=0.1, weight_decay=0.0, momentum=0.9)


def train(model, optimizer, steps):
    tokens = torch.arange(32).view(2, 16)
    for _ in range(steps):
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def made(cfg=None, steps=3, seed=0):
    torch.manual_seed(seed)
    model = GPT(model_config(), 257)
    optimizer = optim.build(model, cfg or adamw_config())
    train(model, optimizer, steps)
    return model, optimizer


def publish(run_dir, step, best=None, keep=2, model=None, optimizer=None):
    if model is None:
        model, optimizer = made()
    progress = Progress(step=step, tokens=step * 10, best=best or 9.0, best_step=step if best else 0)
    return checkpoint.publish(run_dir, model, optimizer, progress, IDENTITY, {"seed": 1}, keep)


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "missing":
        return file.unlink()
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "zero-filled":
        content = bytearray(len(content))
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("cfg", [adamw_config(), MUON, SGD], ids=lambda cfg: cfg.name)
def test_ten_steps_equal_five_then_save_and_load_then_five_bit_for_bit(tmp_path, cfg):
    straight, _ = made(cfg, steps=10)
    model, optimizer = made(cfg, steps=5)
    progress = Progress(step=5, tokens=50, best=3.5, best_step=4, stale=1, loss_sum=1.25, loss_targets=7)
    path = checkpoint.publish(tmp_path, model, optimizer, progress, IDENTITY, {}, keep=1)
    resumed, resumed_optimizer = made(cfg, steps=0, seed=99)
    assert checkpoint.restore(path, resumed, resumed_optimizer) == progress
    train(resumed, resumed_optimizer, 5)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, best in ((1, 3.0), (2, 2.0), (3, None), (4, None), (5, None)):
        publish(tmp_path, step, best, keep=2)
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == [
        "step_00000002", "step_00000004", "step_00000005"
    ]  # fmt: skip
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_run_that_went_back_behind_damaged_checkpoints_keeps_what_it_saves(tmp_path):
    publish(tmp_path, 80)
    damage(publish(tmp_path, 120) / "state.safetensors", "truncated")
    new = publish(tmp_path, 90, keep=1)
    assert checkpoint.verify(new).step == 90


@pytest.mark.parametrize("number", range(1, checkpoint.SHARDED + 1))
def test_checkpoints_of_every_released_format_are_read_and_trained_on(number):
    """tests/golden has one of each, written by the version that released the format. After it that version's model had
    these logits in the last place of the tokens 32 to 39, and these losses in the next three steps on them."""
    golden = ROOT / "tests" / "golden" / f"format_{number}"
    (path,) = checkpoint.listed(golden / "checkpoints")
    manifest = checkpoint.verify(path)
    model = GPT(manifest.model, manifest.vocab_size)
    optimizer = optim.build(model, adamw_config(lr=0.01))
    progress = checkpoint.restore(path, model, optimizer)
    assert (progress.step, progress.reported, progress.tokens, progress.best, progress.loss_targets) == (
        3, 3, 24, 5.25, 7
    )  # fmt: skip
    assert checkpoint.read_config(path)["data"]["fingerprint"] == "f1"
    shared = loading.load(str(golden / "last_model.pt"), ROOT, CPU).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), shared.parameters(), strict=True))
    tokens, losses = torch.arange(32, 40)[None], []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx([5.379622, 5.317497, 5.247513], abs=1e-5)
    logits = [-0.273888, -0.152829, -0.209210, -0.228935]
    assert model(tokens)[0, -1, :4].tolist() == pytest.approx(logits, abs=1e-5)


def test_settings_such_as_the_learning_rate_are_those_of_the_run_and_not_of_the_checkpoint(tmp_path):
    path = publish(tmp_path, 1)
    model, optimizer = made(adamw_config(lr=0.5), steps=0)
    checkpoint.restore(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["peak_lr"] == 0.5


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    path = publish(tmp_path, 1)
    for cfg in (MUON, SGD):
        model, optimizer = made(cfg, steps=0)
        with pytest.raises(UserError, match="state of another optimizer") as caught:
            checkpoint.restore(path, model, optimizer)
        assert caught.value.code == 3


def test_weights_that_are_not_finite_are_never_published(tmp_path):
    publish(tmp_path, 1)
    for value in (math.nan, math.inf, -math.inf):
        model, optimizer = made()
        with torch.no_grad():
            model.h[1].mlp.c_fc.weight[3, 5] = value
        with pytest.raises(UserError, match=r"weight h.1.mlp.c_fc.weight is not finite") as caught:
            publish(tmp_path, 2, model=model, optimizer=optimizer)
        assert caught.value.code == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_step_that_is_published_again_replaces_what_was_there(tmp_path):
    publish(tmp_path, 1, best=3.0)
    publish(tmp_path, 1, best=2.0)
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.verify(path).val_loss == 2.0


def test_what_a_killed_process_left_is_cleared_away_and_a_checkpoint_about_to_be_replaced_comes_back(tmp_path):
    path = publish(tmp_path, 1)
    folder = path.parent
    path.rename(checkpoint.hidden(path, "replaced"))  # killed between the two renames
    shutil.copytree(checkpoint.hidden(path, "replaced"), checkpoint.hidden(path, "new"))
    shutil.copytree(checkpoint.hidden(path, "replaced"), folder / ".step_00000009.removed")
    checkpoint.recover(folder)
    assert [left.name for left in folder.iterdir()] == ["step_00000001"]
    assert checkpoint.verify(path).step == 1


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    path = publish(tmp_path, 1)
    other = path.rename(path.with_name("step_00000007"))
    with pytest.raises(UserError, match="of step 1"):
        checkpoint.verify(other)


def test_a_place_that_cannot_be_written_to_is_an_error_of_the_environment(tmp_path):
    (tmp_path / "checkpoints").write_bytes(b"a file")
    with pytest.raises(UserError, match="checkpoint 2 not written") as caught:
        publish(tmp_path, 2)
    assert caught.value.code == 5


def test_everybody_may_read_what_the_users_umask_lets_them(tmp_path):
    path = publish(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
