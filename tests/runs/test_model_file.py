"""Models in files: rebuilt from the file alone, and refused with a reason."""

import os
import pickle

import pytest
import torch
from conftest import ROOT, model_config
from test_checkpoint import CPU, IDENTITY, made, publish

from gpt.errors import UserError
from gpt.runs import model_file
from gpt.runs.checkpoint import Identity
from gpt.weights import loading


@pytest.mark.parametrize("what", ["run", "checkpoint", "pt"])
def test_a_model_is_rebuilt_from_the_file_alone(tmp_path, what):
    model, optimizer = made()
    path = publish(tmp_path, 7, model=model, optimizer=optimizer)
    model_file.save_model(tmp_path / "last_model.pt", model, IDENTITY, step=7)
    source = {"run": tmp_path, "checkpoint": path, "pt": tmp_path / "last_model.pt"}[what]
    loaded = loading.load(str(source), ROOT, CPU)
    assert (loaded.tokenizer_name, loaded.template, loaded.step) == ("bytes", "alpaca", 7)
    assert not loaded.model.training
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded.model(tokens), model.eval()(tokens))


def test_a_run_directory_means_its_best_checkpoint(tmp_path):
    for step, best in ((1, 3.0), (2, 2.0), (3, None)):
        publish(tmp_path, step, best, keep=3)
    assert loading.load(str(tmp_path), ROOT, CPU).step == 2


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
        loading.load(str(tmp_path / "last_model.pt"), ROOT, CPU)
    assert caught.value.code == 3
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04N.", b"README", b"."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        loading.load(str(tmp_path / "x.pt"), ROOT, CPU)
    assert caught.value.code == 3 and "\n" not in str(caught.value)


def test_a_state_dict_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no GPT-2 in a layout that is known; its tensors are weight"):
        loading.load(str(tmp_path / "x.pt"), ROOT, CPU)


def test_weights_that_do_not_fit_name_the_first_tensor_and_both_shapes(tmp_path):
    model, _ = made()
    model_file.save_model(tmp_path / "x.pt", model, Identity(model_config(n_embd=32), 257, "bytes", None), 1)
    with pytest.raises(UserError, match=r"tensor wte.weight: \[257, 16\] in the file, \[257, 32\] in the model"):
        loading.load(str(tmp_path / "x.pt"), ROOT, CPU)


@pytest.mark.parametrize("where", ["nothing", "empty"])
def test_an_empty_or_missing_directory_is_refused(tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        loading.load(str(tmp_path / where), ROOT, CPU)
    assert caught.value.code == 3


def test_absurd_sizes_cost_neither_memory_nor_time(tmp_path):
    """A file may claim anything: nothing is allocated before the tensors in it have been compared."""
    model, _ = made()
    for changes in ({"n_layer": 10**9}, {"n_embd": 2 * 10**9}, {"context_length": 10**12}, {"n_head": 7}):
        claimed = Identity(model_config(**changes), 257, "bytes", None)
        model_file.save_model(tmp_path / "x.pt", model, claimed, 1)
        with pytest.raises(UserError) as caught:
            loading.load(str(tmp_path / "x.pt"), ROOT, CPU)
        assert caught.value.code == 3


def test_a_tensor_that_repeats_one_number_cannot_claim_to_be_large(tmp_path):
    weights = {"wte.weight": torch.zeros(1).expand(10**9, 10**6)}
    content = {"format": 2, "step": 1, **IDENTITY.as_dict(), "weights": weights}
    torch.save(content, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    with pytest.raises(UserError, match="contiguous"):
        loading.load(str(tmp_path / "x.pt"), ROOT, CPU)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    model, _ = made()
    path = tmp_path / "last_model.pt"
    model_file.save_model(path, model, IDENTITY, 1)
    (tmp_path / ".last_model.pt.new").mkdir()  # in the way
    with pytest.raises(UserError, match=r"last_model\.pt not written") as caught:
        model_file.save_model(path, model, IDENTITY, 2)
    assert caught.value.code == 5
    assert loading.load(str(path), ROOT, CPU).step == 1
