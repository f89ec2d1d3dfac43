"""Going on with a run: from the newest valid checkpoint, with the settings that it was started with."""

import json

import pytest
import torch
from conftest import model_config
from test_checkpoint import IDENTITY, damage, made, publish

from gpt.errors import UserError
from gpt.progress import Progress
from gpt.runs import checkpoint, resume
from gpt.runs.checkpoint import Identity

BEFORE = {
    "seed": 1, "optimizer": {"name": "adamw", "lr": 0.1}, "schedule": {"name": "cosine"},
    "train": {"tokens_per_step": 64, "max_steps": 5, "micro_batch": 4}, "total_steps": 5,
    "data": {"path": "a.csv", "mask": "all", "prompts": ["x"], "fingerprint": "f1"},
}  # fmt: skip


def resumed(run_dir, settings=None, mode="auto", identity=IDENTITY, allowed=()):
    model, optimizer = made(steps=0)
    found = resume.find(run_dir, mode)
    return resume.restore(found, model, optimizer, identity, settings or {"seed": 1}, list(allowed))


def started(run_dir):
    """A run with the settings BEFORE and a checkpoint of step 5."""
    model, optimizer = made()
    checkpoint.publish(run_dir, model, optimizer, Progress(step=5), IDENTITY, BEFORE, keep=1)


def changed(**sections):
    settings = json.loads(json.dumps(BEFORE))
    for name, value in sections.items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    return settings


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "zero-filled", "one bit flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, name, how):
    caplog.set_level("INFO", "gpt")
    publish(tmp_path, 100)
    damage(publish(tmp_path, 120) / name, how)
    assert resumed(tmp_path).step == 100
    assert "step_00000120 damaged" in caplog.text and name in caplog.text
    assert "using step_00000100" in caplog.text
    assert "resuming from step_00000100 (newest valid of 2)" in caplog.text


def test_no_valid_checkpoint_is_an_error_and_never_a_silent_start_from_the_beginning(tmp_path):
    damage(publish(tmp_path, 120) / "state.safetensors", "truncated")
    with pytest.raises(UserError, match=r"no usable checkpoint.*step_00000120") as caught:
        resumed(tmp_path)
    assert caught.value.code == 3
    assert (tmp_path / "checkpoints" / "step_00000120" / "state.safetensors").exists()


def test_a_new_directory_starts_at_step_0_and_resume_never_refuses_an_old_one(tmp_path):
    assert resumed(tmp_path, mode="never") == Progress()
    publish(tmp_path, 1)
    with pytest.raises(UserError, match="holds checkpoints already"):
        resumed(tmp_path, mode="never")


def test_another_architecture_is_refused_with_every_field_that_differs(tmp_path):
    publish(tmp_path, 1)
    other = Identity(model_config(n_layer=3, n_embd=32), 300, "bytes", "plain")
    with pytest.raises(UserError) as caught:
        resumed(tmp_path, identity=other)
    assert caught.value.code == 3
    for difference in ("model.n_layer 2 != 3", "model.n_embd 16 != 32", "vocab_size 257 != 300", "alpaca != plain"):
        assert difference in str(caught.value)


def test_a_changed_setting_is_refused_with_both_values_unless_its_key_is_allowed(tmp_path, caplog):
    started(tmp_path)
    other = changed(seed=2, optimizer={"lr": 0.2}, schedule={"name": "linear"})
    with pytest.raises(UserError) as caught:
        resumed(tmp_path, other)
    assert caught.value.code == 2
    for difference in ("optimizer.lr 0.1 != 0.2", "seed 1 != 2", "schedule.name cosine != linear"):
        assert difference in str(caught.value)
    assert "allow_changed=[seed,optimizer.lr,schedule.name]" in str(caught.value)
    with pytest.raises(UserError, match="seed 1 != 2") as caught:
        resumed(tmp_path, other, allowed=["optimizer.lr", "schedule"])
    assert "optimizer.lr" not in str(caught.value)
    assert resumed(tmp_path, other, allowed=["seed", "optimizer", "schedule.name"]).step == 5
    assert "optimizer.lr was 0.1 and is now 0.2" in caplog.text


def test_another_optimizer_is_refused_also_where_changes_of_the_optimizer_are_allowed(tmp_path):
    started(tmp_path)
    other = changed(optimizer={"name": "muon", "lr": 0.2})
    with pytest.raises(UserError, match=r"optimizer.name \w+ != muon: a checkpoint is of one optimizer") as caught:
        resumed(tmp_path, other, allowed=["optimizer"])
    assert caught.value.code == 2 and f"init.from={tmp_path}" in caught.value.remedy


def test_a_setting_that_is_younger_than_the_checkpoint_had_the_value_that_changes_nothing(tmp_path):
    started(tmp_path)
    same = {"nesterov": True, "second_moment": None, "embedding_lr": None}
    windows = {"window_warmup": None, "window_start": 64}
    assert resumed(tmp_path, changed(optimizer=same, train={"ema": None}, schedule=windows)).step == 5
    with pytest.raises(UserError, match=r"train.ema None != 0.9, optimizer.nesterov True != False"):
        resumed(tmp_path, changed(optimizer=same | {"nesterov": False}, train={"ema": 0.9}))


def test_changed_data_is_refused_with_both_fingerprints_and_what_differs(tmp_path):
    started(tmp_path)
    with pytest.raises(UserError, match=r"data.fingerprint f1 != f2, data.path a.csv != b.csv") as caught:
        resumed(tmp_path, changed(data={"fingerprint": "f2", "path": "b.csv"}))
    assert caught.value.code == 2
    assert resumed(tmp_path, changed(data={"fingerprint": "f2"}), allowed=["data"]).step == 5


def test_other_prompts_another_place_and_another_length_are_no_change_of_the_run(tmp_path, caplog):
    started(tmp_path)
    longer = changed(train={"max_steps": 50}, total_steps=50, data={"path": "moved.csv", "prompts": ["y"]})
    assert resumed(tmp_path, longer).step == 5
    assert "planned for 5 steps and is now for 50: the learning rate follows" in caplog.text


def test_another_micro_batch_is_announced(tmp_path, caplog):
    started(tmp_path)
    assert resumed(tmp_path, changed(train={"micro_batch": 2})).step == 5
    assert "train.micro_batch was 4" in caplog.text


def test_what_may_be_changed_anyway_may_be_allowed_and_a_misspelt_key_or_the_model_may_not(tmp_path):
    started(tmp_path)
    longer = changed(train={"max_steps": 50}, total_steps=50)
    allowed = ["train.max_steps", "data", "data.fingerprint", "data.columns.answer", "wandb", "seed"]
    assert resumed(tmp_path, longer, allowed=allowed).step == 5
    with pytest.raises(UserError, match=r"allow_changed: unknown key optimzer.lr, did you mean optimizer.lr\?"):
        resumed(tmp_path, allowed=["optimzer.lr"])
    for key in ("model", "model.dropout"):
        with pytest.raises(UserError, match=f"allow_changed: {key} cannot change"):
            resumed(tmp_path, allowed=[key])


def test_the_newest_of_three_with_a_hidden_rest_of_a_kill_is_used(tmp_path, caplog):
    caplog.set_level("INFO", "gpt")
    for step in (1, 2, 3):
        publish(tmp_path, step, keep=3)
    (tmp_path / "checkpoints" / ".step_00000004.new").mkdir()
    assert resumed(tmp_path).step == 3
    assert "resuming from step_00000003 (newest valid of 3)" in caplog.text
    assert not (tmp_path / "checkpoints" / ".step_00000004.new").exists()


def test_the_weights_are_those_that_were_saved(tmp_path):
    model, optimizer = made(steps=7)
    publish(tmp_path, 7, model=model, optimizer=optimizer)
    fresh, fresh_optimizer = made(steps=0, seed=5)
    resume.restore(resume.find(tmp_path, "auto"), fresh, fresh_optimizer, IDENTITY, {"seed": 1}, [])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_run_from_before_there_were_other_objectives_is_one_of_next_token_prediction(tmp_path):
    started(tmp_path)
    assert resumed(tmp_path, changed(objective={"name": "next_token"})).step == 5
    with pytest.raises(UserError, match=r"objective.name next_token != smoothed.*allow_changed=\[objective.name\]"):
        resumed(tmp_path, changed(objective={"name": "smoothed"}))
