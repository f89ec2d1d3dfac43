"""Low-rank adapters: what they compute, what of the model they leave alone, and what they become in the end."""

import copy

import pytest
import torch
from conftest import LINEAR, NO_SOAP, model_config
from torch import nn
from torch.nn import functional as F

from gpt import lora, optim
from gpt.config.schema import LoRAConfig
from gpt.model import GPT
from gpt.sampling import Draws, generate

TOKENS = torch.arange(32).view(2, 16)
CONFIG = LoRAConfig(4, 8, list(LINEAR))


def build(**changes):
    """A model with weights that do not vanish beside the adapters'."""
    torch.manual_seed(0)
    model = GPT(model_config(**changes), 257).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.02 * torch.randn_like(parameter))
    return model


def adapted(cfg=CONFIG, **changes):
    """A model whose adapters do something, as after training."""
    model = build(**changes)
    lora.add(model, cfg, seed=1)
    with torch.no_grad():
        for name, tensor in lora.adapters(model).items():
            if name.endswith("lora_b"):
                tensor.normal_(0, 0.1)
    return model


def near(a, b, tolerance=2e-6):
    return (a - b).abs().max() < tolerance


def loss_of(model, tokens=TOKENS):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def test_fresh_adapters_leave_every_logit_as_it_was_bit_for_bit():
    model = build()
    before = model(TOKENS)
    lora.add(model, CONFIG)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 8.0), (8, 3.0)])
def test_the_change_of_a_weight_is_alpha_over_rank_times_b_a(rank, alpha):
    layer = adapted(LoRAConfig(rank, alpha, ["mlp.c_fc"])).h[0].mlp.c_fc
    x = torch.randn(3, 5, 16)
    weight = layer.weight + alpha / rank * layer.lora_b @ layer.lora_a
    assert near(layer(x), x @ weight.T + layer.bias) and not near(layer(x), x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("targets", [["attn.c_attn"], list(LINEAR)], ids=["one", "all"])
def test_a_merged_model_is_a_plain_one_with_the_same_logits(targets):
    model, plain = adapted(LoRAConfig(4, 8, targets)), build()
    apart = model(TOKENS)
    lora.merge(model)
    assert near(model(TOKENS), apart) and not near(plain(TOKENS), apart, 0.01)  # the adapters did something
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merged_weights_are_those_of_the_merged_model_bit_for_bit():
    model = adapted()
    merged = lora.merged_weights(model.state_dict(), CONFIG)
    lora.merge(model)
    assert merged.keys() == model.state_dict().keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in model.state_dict().items())
    assert lora.merged_weights(build().state_dict(), CONFIG).keys() == merged.keys()  # nothing to merge


@pytest.mark.parametrize("optimizer", ["adamw", "muon", pytest.param("soap", marks=NO_SOAP), "sgd"])
def test_training_moves_the_adapters_and_not_one_bit_of_the_weights(optimizer):
    from test_optim import CONFIGS, SOAP

    model = build()
    lora.add(model, CONFIG)
    before = copy.deepcopy(model.state_dict())
    first_loss = loss_of(model).item()
    cfg = next(cfg for cfg in [*CONFIGS, SOAP] if cfg.name == optimizer)
    stepping = optim.build(model, cfg)
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == lora.adapters(model).keys()
        stepping.step()
        stepping.zero_grad()
    assert loss.item() < first_loss
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == lora.adapters(model).keys() and len(moved) == 2 * 4 * 2  # A and B, linear layers, blocks


def test_the_weights_keep_their_names_and_adapters_stand_beside_them():
    model = build()
    plain = model.state_dict().keys()
    n_plain = model.n_parameters()
    lora.add(model, LoRAConfig(4, 8, ["attn.c_attn", "mlp.c_proj"]))
    shapes = {name: list(tensor.shape) for name, tensor in lora.adapters(model).items()}
    assert shapes == {
        f"h.{i}.{layer}": shape
        for i in (0, 1)
        for layer, shape in {
            "attn.c_attn.lora_a": [4, 16], "attn.c_attn.lora_b": [48, 4],
            "mlp.c_proj.lora_a": [4, 64], "mlp.c_proj.lora_b": [16, 4],
        }.items()
    }  # fmt: skip
    assert model.state_dict().keys() == plain | shapes.keys()
    assert model.n_parameters() == n_plain + sum(a * b for a, b in shapes.values())


def test_a_model_built_without_memory_is_filled_from_saved_weights():
    saved = adapted()
    with torch.device("meta"):
        model = GPT(model_config(), 257).eval()
        lora.add(model, CONFIG)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model(TOKENS), saved(TOKENS))


def test_adapters_are_drawn_from_their_seed_and_from_nothing_else():
    drawn = []
    for seed in (1, 1, 2):
        model = build()
        before = torch.get_rng_state()
        lora.add(model, CONFIG, seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(torch.cat([tensor.flatten() for tensor in lora.adapters(model).values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    a = model.h[1].mlp.c_proj.lora_a  # (4, 64), uniform up to 1 / sqrt(64)
    assert 0.12 < a.abs().max() <= 1 / 8 and a.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert not torch.equal(a, model.h[0].mlp.c_proj.lora_a)


def test_adapters_are_not_put_upon_adapters():
    model = adapted()
    with pytest.raises(ValueError, match="adapters already"):
        lora.add(model, CONFIG)
    lora.merge(model)
    lora.add(model, CONFIG)


def test_in_bfloat16_gradients_are_float32_and_near_the_exact_ones():
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss_of(model).backward()
        tensors = [p.grad for p in model.parameters() if p.requires_grad]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        gradients.append(torch.cat([tensor.flatten() for tensor in tensors]))
    assert not torch.equal(*gradients)
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        model.gradient_checkpointing = checkpointing
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_text_is_the_same_with_and_without_a_cache_before_and_after_merging():
    def text(use_cache):
        draws = Draws(12, eos=None, temperature=0.8, top_k=None, top_p=None)
        return generate(model, [1, 2, 3], draws, num_samples=2, seed=3, use_cache=use_cache)

    model = adapted()
    texts = [text(True), text(False)]
    lora.merge(model)
    texts += [text(True), text(False)]
    assert all(other == texts[0] for other in texts) and len(texts[0][0]) == 12


@pytest.mark.exhaustive  # loading the compiler takes seconds
def test_the_compiler_takes_a_block_with_adapters_as_one_graph():
    block = adapted().h[0]
    x = torch.randn(2, 16, 16)
    compiled = torch.compile(block, backend="eager", fullgraph=True)  # traces it, and spares us the C++ compiler
    assert near(compiled(x, None, None), block(x, None, None))


def test_a_layer_without_an_adapter_stays_what_it_was():
    model = adapted(LoRAConfig(2, 2, ["attn.c_proj"]))
    kinds = {target: type(model.h[1].get_submodule(target)) for target in LINEAR}
    assert kinds == {target: lora.LoRALinear if target == "attn.c_proj" else nn.Linear for target in LINEAR}
