"""Architectures other than GPT-2 train, resume, are estimated and talk: one that the project does not know, without a
change in gpt/, and the modern one with all that no public model has."""

import shutil
from dataclasses import replace
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from conftest import ROOT, UNPUBLISHED
from test_launch import composed
from test_train import SMALL, in_directory
from torch import nn
from torch.nn import functional as F

from gpt import sampling
from gpt.config import launch
from gpt.config.families import MODELS, Family, ModelConfig
from gpt.config.fields import Positive, section
from gpt.config.schema import TrainConfig
from gpt.errors import UserError
from gpt.files.jsonl import read_rows
from gpt.machine import counting
from gpt.model import LanguageModel, same_document
from gpt.runs import checkpoint
from gpt.weights import export, loading
from train import train


@section
class RotaryConfig(ModelConfig):
    """The keys of its own are checked like all others."""

    linear_layers: ClassVar[tuple[str, ...]] = ("qkv", "out", "up", "down")

    rotary_base: Positive


class Layer(nn.Module):
    """RMSNorm before attention with rotary positions (Su et al., 2021), and before a gated MLP; no biases."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.norms = nn.ModuleList(nn.RMSNorm(cfg.n_embd) for _ in range(2))
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.up = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.down = nn.Linear(2 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, positions, mask, cache):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(B, T, 3, self.cfg.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        q, k = (rotated(t, positions, self.cfg.rotary_base) for t in (q, k))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, C))
        gate, value = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


def rotated(x, positions, base):
    """(B, H, T, D) with each pair of numbers turned by an angle that grows with the position, (B, T) or (T,)."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * base ** (-torch.arange(half, device=x.device) / half)  # (B, T, D / 2) or (T, D / 2)
    cos, sin = (f(angles).unsqueeze(-3) for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Rotary(LanguageModel):
    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.embedding = nn.Embedding(vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        nn.init.normal_(self.embedding.weight, 0.0, 0.02)

    def hidden(self, tokens, positions=None, documents=None, cache=None):
        past, T = 0 if cache is None else cache.length, tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        mask = None if documents is None else same_document(documents, T)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = self.run(layer, x, positions, mask, cache)
        return self.norm(x)

    @property
    def head(self):
        return self.embedding.weight

    @property
    def blocks(self):
        return self.layers


YAML = """\
# @package _global_
model:
  family: rotary
  name: rotary
  n_layer: 2
  n_head: 2
  n_embd: 16
  context_length: 32
  dropout: 0.0
  tie_weights: true
  rotary_base: 10_000.0
train:
  tokens_per_step: 256
  micro_batch: 8
  max_tokens: 128_000
"""


@pytest.fixture(autouse=True)
def registered():
    MODELS["rotary"] = Family(RotaryConfig, "test_second_architecture:Rotary")
    yield
    del MODELS["rotary"]


MODERN = [
    "model=modern_tiny", "model.n_layer=2", "model.n_embd=16", "model.head_size=8", "model.mlp_size=24",
    "model.context_length=32", "model.tie_weights=false",
    *(f"model.{key}={value}" for key, value in UNPUBLISHED.items()),
]  # fmt: skip
LAYERS = {"rotary": ("qkv", "down"), "modern": ("self_attn.q_proj", "mlp.down_proj")}


def settings(folder, *changes, yaml=YAML, family="rotary"):
    """What train.py gets where conf/model/ has a file for this architecture."""
    (folder / "conf" / "model").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "model" / "rotary.yaml").write_text(yaml)
    small = [text for text in SMALL if not text.startswith("model")]
    search = f"hydra.searchpath=[file://{ROOT},file://{folder / 'conf'}]"
    data = ["data.tokenizer=bytes", f"data.prepared_dir={folder / 'data'}"]
    model = MODERN if family == "modern" else ["model=rotary"]
    cfg = composed(search, *model, *small, *data, "wandb.mode=disabled", *changes)
    return launch.validated(cfg, TrainConfig)


@pytest.fixture(params=["rotary", "modern"])
def run(request, tmp_path):
    cfg = settings(tmp_path, family=request.param)
    train(in_directory(cfg, tmp_path / "run"))
    return cfg, tmp_path / "run"


def newest(run_dir):
    return checkpoint.listed(run_dir / "checkpoints")[-1]


def test_it_trains_and_its_checkpoints_name_its_family(run):
    cfg, run_dir = run
    losses = [row["val/loss"] for row in read_rows(run_dir / "metrics.jsonl") if "val/loss" in row]
    assert losses[-1] < losses[0]
    manifest = checkpoint.verify(newest(run_dir))
    assert manifest.model == cfg.model and manifest.model.family == cfg.model.family
    assert manifest.format == checkpoint.FORMAT


def test_it_resumes_to_the_same_weights(run, tmp_path):
    cfg, run_dir = run
    expected = safetensors.torch.load_file(newest(run_dir) / "model.safetensors")
    shutil.rmtree(newest(run_dir))
    train(in_directory(cfg, run_dir))
    stored = safetensors.torch.load_file(newest(run_dir) / "model.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)


@pytest.mark.parametrize("run", ["rotary"], indirect=True)
def test_its_cost_is_counted_from_its_own_module(run, tmp_path):
    cfg, run_dir = run
    cost = train(replace(cfg, dry_run=True, out_dir=str(run_dir)))
    d, vocabulary = 16, 257
    parameters = vocabulary * d + 2 * (3 * d * d + d * d + 4 * d * d + 2 * d * d + 2 * d) + d
    assert cost.parameters == cost.trained == parameters
    count = counting.step(cfg.model, None, vocabulary)
    assert count.forward == 32 * 2 * (2 * 10 * d * d + 4 * 32 * d)  # per token and layer: products, attention
    assert cost.memory.activations_and_gradients > 0


def test_it_continues_a_prompt_with_and_without_a_cache(run):
    _, run_dir = run
    model = loading.load(str(run_dir), ROOT, torch.device("cpu")).model
    draws = sampling.Draws(20, eos=None, temperature=0.0, top_k=None, top_p=None)
    cached, plain = (
        sampling.generate(model, [7, 8, 9], draws, num_samples=1, seed=0, use_cache=on) for on in (True, False)
    )
    assert cached == plain and len(cached[0]) == 20


@pytest.mark.parametrize("family", LAYERS)
def test_a_part_of_it_can_be_trained(tmp_path, family):
    cfg = settings(tmp_path, "finetune=last_blocks", "finetune.n_blocks=1", "finetune.layer_decay=0.9", family=family)
    before = train(in_directory(cfg, tmp_path / "run"))
    assert before > 0
    weights = safetensors.torch.load_file(newest(tmp_path / "run") / "model.safetensors")
    first = safetensors.torch.load_file(checkpoint.listed(tmp_path / "run" / "checkpoints")[0] / "model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], first[name])}
    assert changed and all(name.startswith(("layers.1.", "norm.", "copying.", "lm_head.")) for name in changed)


@pytest.mark.parametrize("family", LAYERS)
def test_it_has_adapters_beside_the_layers_that_it_names(tmp_path, family):
    targets = f"finetune.targets=[{','.join(LAYERS[family])}]"
    cfg = settings(tmp_path, "finetune=lora", "finetune.rank=2", targets, family=family)
    train(in_directory(cfg, tmp_path / "run"))
    weights = safetensors.torch.load_file(newest(tmp_path / "run") / "model.safetensors")
    layers = {name.removesuffix(".lora_a") for name in weights if name.endswith(".lora_a")}
    assert layers == {f"layers.{i}.{name}" for i in (0, 1) for name in LAYERS[family]}
    assert all(weights[f"{layer}.lora_b"].any() for layer in layers)
    tokens = torch.arange(12)[None]
    with_adapters, merged = (
        loading.load(str(path), ROOT, torch.device("cpu")).model(tokens)
        for path in (newest(tmp_path / "run"), tmp_path / "run" / "last_model.pt")
    )
    assert torch.allclose(with_adapters, merged, atol=1e-6)
    assert not (tmp_path / "run" / "adapter").exists()  # peft would look for a model of transformers


def test_a_layer_that_it_does_not_have_is_refused_with_those_that_it_has(tmp_path):
    with pytest.raises(UserError) as caught:
        settings(tmp_path, "finetune=lora", "finetune.targets=[attn.c_attn]")
    line = "finetune.targets.0=attn.c_attn: the linear layers of rotary are qkv, out, up, down"
    assert line in str(caught.value) and caught.value.code == 2


def test_its_own_keys_are_checked_like_all_others(tmp_path):
    with pytest.raises(UserError, match=r"model.rotary_base=-1: input should be greater than 0"):
        settings(tmp_path, "model.rotary_base=-1")
    with pytest.raises(UserError, match=r"unknown key model.rotary_bas, did you mean model.rotary_base\?"):
        settings(tmp_path, yaml=YAML.replace("rotary_base", "rotary_bas"))


@pytest.mark.parametrize("run", ["rotary"], indirect=True)
def test_the_export_to_gpt2_refuses_it_in_one_line(run, tmp_path):
    _, run_dir = run
    loaded = loading.load(str(run_dir), ROOT, torch.device("cpu"))
    with pytest.raises(UserError, match="it is of the family rotary, and only gpt2") as caught:
        export.write(loaded, tmp_path / "exported")
    assert caught.value.code == 2 and not (tmp_path / "exported").exists()


@pytest.mark.parametrize("run", ["rotary"], indirect=True)
def test_where_its_family_is_not_registered_its_checkpoint_is_refused_by_name(run):
    _, run_dir = run
    del MODELS["rotary"]
    with pytest.raises(UserError, match=r"model.family: it is one of gpt2") as caught:
        checkpoint.read_manifest(newest(run_dir))
    MODELS["rotary"] = Family(RotaryConfig, "test_second_architecture:Rotary")
    assert caught.value.code == 3
