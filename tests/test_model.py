"""The network: causality, sizes, first weights, attention, packed rows and the cache."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import model_config, packed_and_alone
from omegaconf import OmegaConf
from torch.nn import functional as F

from gpt.config.families import GPT2Config, ModelConfig
from gpt.model import GPT, same_document
from gpt.sampling import KVCache

TINY = model_config(context_length=12)
VOCABULARY = 50
PRESETS = Path(__file__).resolve().parent.parent / "conf/model"


def build(config: ModelConfig = TINY, vocab_size: int = VOCABULARY) -> GPT:
    torch.manual_seed(0)
    model = GPT(config, vocab_size).eval()
    with torch.no_grad():  # ten times GPT-2's initial weights, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.mul_(10).add_(0.1 * torch.randn_like(parameter))
    return model


def shipped(name: str, **changes: object) -> ModelConfig:
    return dataclasses.replace(GPT2Config(name=name, **OmegaConf.load(PRESETS / f"{name}.yaml").model), **changes)


def test_a_later_token_never_changes_earlier_logits():
    model = build()
    embedded = []
    model.wte.register_forward_hook(lambda module, inputs, output: embedded.append(output.requires_grad_()))
    logits = model(torch.randint(VOCABULARY, (1, 8)))
    for position in range(8):
        [gradient] = torch.autograd.grad(logits[0, position].square().sum(), embedded[0], retain_graph=True)
        moved_by = gradient[0].abs().sum(-1)  # (T,)
        assert (moved_by[: position + 1] > 0).all()
        assert (moved_by[position + 1 :] == 0).all()


def test_the_untrained_loss_is_the_logarithm_of_the_vocabulary_size():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, n_embd=64, context_length=128), 50257).eval()
    tokens = torch.randint(50257, (2, 129))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(50257), rel=0.01)


def test_a_tied_head_is_the_token_embedding_itself():
    model = build()
    assert "lm_head.weight" not in model.state_dict()
    before = model(torch.tensor([[1, 2]]))
    with torch.no_grad():
        model.wte.weight[7] = 0
    assert before[0, -1, 7] != 0
    assert model(torch.tensor([[1, 2]]))[0, -1, 7] == 0


def test_an_untied_head_is_a_matrix_of_its_own():
    model = build(dataclasses.replace(TINY, tie_weights=False))
    assert model.n_parameters() == build().n_parameters() + VOCABULARY * TINY.n_embd
    assert model.lm_head.weight.data_ptr() != model.wte.weight.data_ptr()


@pytest.mark.parametrize(
    ("size", "tied", "untied"),
    [
        ("small", 124_439_808, 163_037_184),
        ("medium", 354_823_168, 406_286_336),
        ("large", 774_030_080, 838_359_040),
        ("xl", 1_557_611_200, 1_638_022_400),
    ],
)
def test_the_sizes_of_gpt2_have_exactly_its_numbers_of_parameters(size, tied, untied):
    with torch.device("meta"):  # shapes without memory
        assert GPT(shipped(size), 50257).n_parameters() == tied
        assert GPT(shipped(size, tie_weights=False), 50257).n_parameters() == untied


def test_mini_is_6_layers_of_width_384_with_6_heads_and_a_context_of_256():
    mini = shipped("mini")
    assert (mini.n_layer, mini.n_embd, mini.n_head, mini.context_length) == (6, 384, 6, 256)


def test_initial_weights_are_those_of_gpt2():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, n_embd=128), 1000)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * TINY.n_layer) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name


def test_attention_equals_a_three_line_reference():
    attention, x = build().h[0].attn, torch.randn(2, 8, 16)
    heads = attention.c_attn(x).view(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (q k v, B, H, T, D)
    scores = (heads[0] @ heads[1].mT / math.sqrt(8)).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    expected = attention.c_proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x, mask=None, cache=None), expected)


def test_dropout_acts_while_training_and_never_in_evaluation():
    model, tokens = build(dataclasses.replace(TINY, dropout=0.5)), torch.randint(VOCABULARY, (1, 8))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_packed_documents_get_the_logits_that_each_gets_alone():
    model = build()
    torch.testing.assert_close(*packed_and_alone(model, VOCABULARY), rtol=1e-5, atol=1e-5)


def test_the_mask_of_packed_documents_shows_each_its_own_past():
    expected = [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert same_document(torch.tensor([[4, 5, 5]]), 3).int().tolist() == [[expected]]


@pytest.mark.parametrize("pieces", [[8], [1] * 8, [5, 3], [3, 1, 4]])
def test_a_text_seen_in_pieces_through_a_cache_gets_the_logits_of_the_whole(pieces):
    model, tokens = build(), torch.randint(VOCABULARY, (2, 8))
    cache = KVCache(TINY.context_length)
    logits = []
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits.append(model(piece, cache=cache))
            cache.length += piece.shape[1]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=1e-5, atol=1e-5)


def test_more_tokens_than_the_context_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="13 tokens exceed the context length 12"):
        build()(torch.zeros(1, 13, dtype=torch.long))
