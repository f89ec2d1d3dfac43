"""Checkpoints: published whole, verified, restored exactly, and never executed."""

import json
import os
import pickle

import pytest
import torch
from conftest import adamw_config, model_config

from gpt import checkpoint, optim
from gpt.checkpoint import Identity
from gpt.errors import UserError
from gpt.loop import Progress
from gpt.model import GPT
from gpt.schema import MuonConfig, SGDConfig

CPU = torch.device("cpu")
IDENTITY = Identity(model_config(), 50, "bytes", "alpaca")
MUON = MuonConfig(name="muon", lr=0.02, weight_decay=0.1, momentum=0.9, adamw_lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
SGD = SGDConfig(name="sgd", lr=0.1, weight_decay=0.0, momentum=0.9)


def train(model, optimizer, steps):
    tokens = torch.arange(32).view(2, 16)
    for _ in range(steps):
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def made(cfg=None, steps=3, seed=0):
    torch.manual_seed(seed)
    model = GPT(model_config(), 50)
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


@pytest.mark.parametrize("what", ["run", "checkpoint", "pt"])
def test_a_model_is_rebuilt_from_the_file_alone(tmp_path, what):
    model, optimizer = made()
    path = publish(tmp_path, 7, model=model, optimizer=optimizer)
    checkpoint.save_model(tmp_path / "last_model.pt", model, IDENTITY, step=7)
    source = {"run": tmp_path, "checkpoint": path, "pt": tmp_path / "last_model.pt"}[what]
    loaded = checkpoint.load_model(source, CPU)
    assert (loaded.tokenizer_name, loaded.template, loaded.step) == ("bytes", "alpaca", 7)
    assert not loaded.model.training
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded.model(tokens), model.eval()(tokens))


def test_a_run_directory_means_its_best_checkpoint(tmp_path):
    for step, best in ((1, 3.0), (2, 2.0), (3, None)):
        publish(tmp_path, step, best, keep=3)
    assert checkpoint.load_model(tmp_path, CPU).step == 2


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, best in ((1, 3.0), (2, 2.0), (3, None), (4, None), (5, None)):
        publish(tmp_path, step, best, keep=2)
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == [
        "step_00000002", "step_00000004", "step_00000005"
    ]  # fmt: skip
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_run_that_went_back_behind_damaged_checkpoints_keeps_what_it_saves(tmp_path):
    publish(tmp_path, 80)
    damage(publish(tmp_path, 120) / "state.pt", "truncated")
    new = publish(tmp_path, 90, keep=1)
    assert checkpoint.verify(new)["step"] == 90


def test_a_changed_setting_is_refused_with_both_values_and_the_length_of_the_run_is_not(tmp_path):
    model, optimizer = made()
    before = {"seed": 1, "optimizer": {"lr": 0.1}, "train": {"tokens_per_step": 64, "max_steps": 5}}
    checkpoint.publish(tmp_path, model, optimizer, Progress(step=5), IDENTITY, before, keep=1)
    longer = before | {"train": {"tokens_per_step": 64, "max_steps": 50}}
    assert checkpoint.resume(tmp_path, "auto", model, optimizer, IDENTITY, longer).step == 5
    other = before | {"seed": 2, "optimizer": {"lr": 0.2}}
    with pytest.raises(UserError, match=r"optimizer.lr 0.1 != 0.2, seed 1 != 2") as caught:
        checkpoint.resume(tmp_path, "auto", model, optimizer, IDENTITY, other)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "zero-filled", "one bit flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, name, how):
    caplog.set_level("INFO", "gpt")
    publish(tmp_path, 100)
    damage(publish(tmp_path, 120) / name, how)
    model, optimizer = made(steps=0)
    assert checkpoint.resume(tmp_path, "auto", model, optimizer, IDENTITY, {"seed": 1}).step == 100
    text = caplog.text
    assert "step_00000120 damaged" in text and name in text
    assert "resuming from step_00000100 (newest valid of 2)" in text


def test_no_valid_checkpoint_is_an_error_and_never_a_silent_start_from_the_beginning(tmp_path):
    damage(publish(tmp_path, 120) / "state.pt", "truncated")
    model, optimizer = made(steps=0)
    with pytest.raises(UserError, match=r"no usable checkpoint.*step_00000120") as caught:
        checkpoint.resume(tmp_path, "auto", model, optimizer, IDENTITY, {"seed": 1})
    assert caught.value.code == 3
    assert (tmp_path / "checkpoints" / "step_00000120" / "state.pt").exists()


def test_a_new_directory_starts_at_step_0_and_resume_never_refuses_an_old_one(tmp_path):
    model, optimizer = made(steps=0)
    assert checkpoint.resume(tmp_path, "never", model, optimizer, IDENTITY, {"seed": 1}) == Progress()
    publish(tmp_path, 1)
    with pytest.raises(UserError, match="holds checkpoints already"):
        checkpoint.resume(tmp_path, "never", model, optimizer, IDENTITY, {"seed": 1})


def test_another_architecture_is_refused_with_every_field_that_differs(tmp_path):
    path = publish(tmp_path, 1)
    other = Identity(model_config(n_layer=3, n_embd=32), 257, "bytes", "plain")
    with pytest.raises(UserError) as caught:
        checkpoint.check_identity(path, other)
    assert caught.value.code == 3
    for difference in ("model.n_layer 2 != 3", "model.n_embd 16 != 32", "vocab_size 50 != 257", "alpaca != plain"):
        assert difference in str(caught.value)


def test_a_newer_format_is_refused(tmp_path):
    path = publish(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())["content"] | {"format": 99}
    manifest = {"content": content, "sha256": checkpoint.hash_json(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        checkpoint.load_model(path, CPU)


class Hostile:
    """Pickles to a call that makes a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("force", [None, "1"])
@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["torch", "raw"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, save, force):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    save({"format": 1, "model": Hostile(tmp_path / "executed"), "weights": {}}, tmp_path / "last_model.pt")
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(tmp_path / "last_model.pt", CPU)
    assert caught.value.code == 3
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04N.", b"README", b"."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(tmp_path / "x.pt", CPU)
    assert caught.value.code == 3 and "\n" not in str(caught.value)


def test_a_state_dict_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a model that this project wrote"):
        checkpoint.load_model(tmp_path / "x.pt", CPU)


def test_weights_that_do_not_fit_name_the_first_tensor_and_both_shapes(tmp_path):
    model, _ = made()
    checkpoint.save_model(tmp_path / "x.pt", model, Identity(model_config(n_embd=32), 50, "bytes", None), 1)
    with pytest.raises(UserError, match=r"tensor h.0.attn.c_attn.bias: \[48\] in the file, \[96\] in the model"):
        checkpoint.load_model(tmp_path / "x.pt", CPU)


@pytest.mark.parametrize("where", ["nothing", "empty"])
def test_an_empty_or_missing_directory_is_refused(tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(tmp_path / where, CPU)
    assert caught.value.code == 3


def test_a_disk_that_refuses_leaves_older_checkpoints_and_no_temporary(tmp_path):
    old = publish(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_00000002").write_bytes(b"in the way")  # a file: the rename will fail
    with pytest.raises(UserError, match="checkpoint 2 not written") as caught:
        publish(tmp_path, 2)
    assert caught.value.code == 5
    assert checkpoint.verify(old)["step"] == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
