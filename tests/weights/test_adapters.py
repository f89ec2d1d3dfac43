"""An adapter is loaded as the model that it makes of its base. What peft writes: tests/runs/test_peft_adapter.py."""

import json

import pytest
import torch
from conftest import ROOT, model_config

from gpt import lora
from gpt.config.schema import LoRAConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.runs import peft_adapter
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import save_model
from gpt.weights import adapters, loading, locate

CPU, CFG = torch.device("cpu"), LoRAConfig(2, 4, ["mlp.c_proj"])


@pytest.fixture
def model(tmp_path):
    """A model with adapters; its base is in base/model.pt, its adapters are in adapter/."""
    torch.manual_seed(3)
    model = GPT(model_config(), 257).eval()
    (tmp_path / "base").mkdir()
    save_model(tmp_path / "base" / "model.pt", model, Identity(model.config, 257, "bytes", "plain"), 7)
    lora.add(model, CFG)
    with torch.no_grad():
        for name, tensor in lora.adapters(model).items():
            tensor.normal_(0, 0.3) if name.endswith("b") else None
    peft_adapter.save(tmp_path / "adapter", model, CFG, "base/model.pt")
    return model


def test_a_base_is_found_relative_to_the_project_or_to_the_adapter(model, tmp_path):
    tokens = torch.arange(12)[None]
    loaded = loading.load("adapter", tmp_path, CPU)
    assert (loaded.model(tokens) - model(tokens)).abs().max() < 1e-5
    assert (loaded.template, loaded.tokenizer_name, loaded.step) == ("plain", "bytes", 7)
    (tmp_path / "base").rename(tmp_path / "adapter" / "base")
    loaded = loading.load(str(tmp_path / "adapter"), ROOT, CPU)
    assert (loaded.model(tokens) - model(tokens)).abs().max() < 1e-5


def test_its_architecture_is_that_of_its_base(model, tmp_path):
    found = locate.architecture(locate.find("adapter", None, tmp_path), tmp_path)
    assert (found.n_layer, found.n_embd, found.context_length) == (2, 16, 16)


def test_what_it_is_says_both_parts(model, tmp_path):
    weights = adapters.read(locate.find("adapter", None, tmp_path), tmp_path)
    assert weights.path == tmp_path / "adapter"
    assert weights.about == f"adapters of {tmp_path / 'base' / 'model.pt'}, a model of this project"
    assert [path.name for path in weights.files] == ["model.pt", "adapter_model.safetensors"]


def test_an_adapter_of_an_adapter_is_refused(model, tmp_path):
    peft_adapter.save(tmp_path / "second", model, CFG, "adapter")
    with pytest.raises(UserError, match="the model that the adapter is for is an adapter") as caught:
        loading.load("second", tmp_path, CPU)
    assert caught.value.code == 3


def test_half_an_adapter_is_refused(model, tmp_path):
    import safetensors.torch

    file = tmp_path / "adapter" / peft_adapter.WEIGHTS
    tensors = safetensors.torch.load_file(file)
    removed = next(name for name in tensors if "lora_A" in name)
    safetensors.torch.save_file({name: t for name, t in tensors.items() if name != removed}, file)
    with pytest.raises(UserError, match="one half is missing") as caught:
        loading.load("adapter", tmp_path, CPU)
    assert caught.value.code == 3
    assert json.loads((tmp_path / "adapter" / peft_adapter.CONFIG).read_text())["r"] == 2


def test_a_base_of_the_hub_is_that_of_the_revision_that_the_adapter_was_trained_on(model, tmp_path, monkeypatch):
    requested = []

    def fetched(name, revision, by_hand):
        requested.append((name, revision))
        return tmp_path

    monkeypatch.setattr(locate, "fetched", fetched)
    peft_adapter.save(tmp_path / "adapter", model, CFG, "gpt2", "abc")
    locate.base_of(locate.find("adapter", None, tmp_path), tmp_path)
    assert requested == [("gpt2", "abc")]


def test_a_file_of_an_adapter_means_the_adapter_and_whole_weights_beside_one_are_the_model(model, tmp_path):
    for name in (peft_adapter.CONFIG, peft_adapter.WEIGHTS):
        assert locate.find(f"adapter/{name}", None, tmp_path) == locate.Source(
            f"adapter/{name}", tmp_path / "adapter", "adapter"
        )
    (tmp_path / "adapter" / "config.json").write_text("{}")
    assert locate.find("adapter", None, tmp_path).kind == "transformers"
