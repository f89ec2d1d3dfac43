"""A model in fewer bits: what becomes of its parts, and how near its probabilities stay."""

import copy
import logging

import pytest
import torch
from conftest import UNPUBLISHED, model_config, modern_config
from torch import nn

from gpt import sampling
from gpt.errors import UserError
from gpt.generation import precision
from gpt.model import GPT
from gpt.modern import Modern

V = 101
MODELS = {
    "tied": lambda: GPT(model_config(n_embd=64), V),
    "untied": lambda: GPT(model_config(n_embd=48, tie_weights=False), V),
    "qwen": lambda: Modern(modern_config(), V),
    "unpublished": lambda: Modern(modern_config(**UNPUBLISHED), V),
}
PACKED = ["bfloat16", "int8", "int4"]
# Nats by which a log-probability may move, about three times what these models do.
BOUNDS = {"bfloat16": 0.06, "int8": 0.1, "int4": 1.0}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that there is something to say
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(0))


def log_probabilities(model, ids) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).float().log_softmax(-1)


@pytest.mark.parametrize("name", PACKED)
def test_probabilities_stay_near_and_one_token_at_a_time_gives_those_of_all_at_once(model, name):
    ids = tokens(2, 10)
    wanted = log_probabilities(model, ids)
    packed = precision.prepare(copy.deepcopy(model), name)
    together = log_probabilities(packed, ids)
    cache, alone = sampling.KVCache(16), []
    with torch.inference_mode():
        for i in range(10):
            alone.append(packed(ids[:1, i : i + 1], cache=cache).float())
            cache.length += 1
    assert (together - wanted).abs().max() < BOUNDS[name]
    assert (torch.cat(alone, 1).log_softmax(-1) - together[:1]).abs().max() < BOUNDS["bfloat16"]
    kept = [t for layer in cache.layers.values() for t in layer if t.is_floating_point()]  # and ids
    assert kept and all(t.dtype == torch.bfloat16 for t in kept)


def test_more_bits_are_nearer(model):
    ids = tokens(4, 16)
    wanted = log_probabilities(model, ids)
    away = [(log_probabilities(precision.prepare(copy.deepcopy(model), name), ids) - wanted).norm() for name in PACKED]
    assert away[0] < away[2] and away[1] < away[2]


def test_no_matrix_of_float32_is_left_and_the_stream_is_float32(model):
    before = sum(p.nbytes for p in model.parameters())
    norms = {name: p for name, p in model.named_parameters() if p.dim() < 2 and not name.endswith("bias")}
    packed = precision.prepare(model, "int8")
    kept = dict(packed.named_parameters())
    assert all(kept[name] is p for name, p in norms.items())  # as they were
    matrices = [name for name, p in kept.items() if p.dtype == torch.float32 and p.dim() > 1 and p.numel()]
    assert not [name for name in matrices if name != "copying.gate.weight"]  # three rows
    assert not [module for module in packed.blocks.modules() if isinstance(module, nn.Linear)]
    assert packed.hidden(tokens(1, 3)).dtype == torch.float32
    assert sum(p.nbytes for p in packed.parameters()) < before / 1.9
    assert packed.head.device.type == "cpu"


def test_float32_is_the_model_itself(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert precision.prepare(model, "float32") is model
    assert model.packed_head is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_common_offset_of_all_logits_costs_nothing():
    """Logits of GPT-2 are around -100, where bfloat16 has steps of 0.5."""
    torch.manual_seed(0)
    model = GPT(model_config(n_embd=64, tie_weights=False), V).eval()
    ids = tokens(1, 8)
    wanted = log_probabilities(model, ids)
    with torch.no_grad():
        direction = model.hidden(ids)[0].mean(0)
        model.lm_head.weight.sub_(100 * direction / direction.square().sum())
    assert model(ids).mean() < -50
    got = log_probabilities(precision.prepare(model, "bfloat16"), ids)
    assert (got - wanted).abs().max() < 0.02


def test_a_capped_head_keeps_its_offset(model):
    packed = precision.prepare(copy.deepcopy(model), "bfloat16")
    if model.logit_softcap:
        assert torch.equal(packed.packed_head.dequantised(torch.bfloat16), model.head.bfloat16())
    else:
        assert packed.packed_head.dequantised(torch.float32).mean(0).abs().max() < 1e-3


def test_text_is_the_same_each_time_and_nan_is_said(model):
    packed = precision.prepare(model, "int4")
    draws = sampling.Draws(6, eos=None, temperature=1.0, top_k=20, top_p=None)
    once = sampling.generate(packed, [1, 2, 3], draws, num_samples=2, seed=1)
    assert sampling.generate(packed, [1, 2, 3], draws, num_samples=2, seed=1) == once
    norm = packed.ln_f if isinstance(packed, GPT) else packed.blocks[0].post_attention_layernorm
    if getattr(norm, "weight", None) is not None:
        nn.init.constant_(norm.weight, torch.nan)
        with pytest.raises(UserError, match="not finite") as error:
            sampling.generate(packed, [1, 2, 3], draws, num_samples=2, seed=1)
        assert error.value.code == 4


def test_a_device_without_the_operator_is_refused_in_one_line(monkeypatch):
    def lacking(*arguments):
        raise NotImplementedError("Could not run 'aten::_weight_int4pack_mm'\nwith arguments from this backend")

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", lacking)
    with pytest.raises(UserError, match="precision=int4 is not supported on cpu") as error:
        precision.prepare(MODELS["tied"](), "int4")
    assert error.value.code == 2 and "\n" not in str(error.value)
    assert str(error.value).endswith("; use precision=float32")


def test_an_operator_that_computes_something_else_is_refused(monkeypatch):
    other = torch.ops.aten._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", lambda *arguments: 0 * other(*arguments))
    with pytest.raises(UserError, match="a product is wrong by 100%"):
        precision.check("int4", torch.device("cpu"))


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_path_is_said_in_one_line(slow, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
    kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
    if slow:  # as where torch has no kernel for the processor's vectors
        many = range(200)
        monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", lambda *a: [kernel(*a) for _ in many][-1])
    monkeypatch.setattr(precision, "MEASURED", 2**20)
    monkeypatch.setattr(precision, "SLOW", 40.0)  # in the cache float32 is up to 8 times as fast
    with caplog.at_level(logging.WARNING, "gpt"):
        precision.prepare(GPT(model_config(n_embd=128, n_layer=2), V).eval(), "int4")
    assert len(caplog.messages) == slow
    if slow:
        assert caplog.messages[0].startswith("precision=int4 is slow on this processor: products with one row take")
