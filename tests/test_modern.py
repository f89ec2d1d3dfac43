"""The second family: equal to transformers' Llama and Qwen3, and each key of its own does what its formula says."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import UNPUBLISHED, modern_config, packed_and_alone
from test_conf import loaded
from torch.nn import functional as F

from gpt import optim
from gpt.config.families import ModernConfig
from gpt.finetune import depths
from gpt.model import GPT, visible
from gpt.modern import Modern, angles, rotated, within
from gpt.sampling import KVCache

VOCABULARY = 50
TINY = modern_config()
LLAMA = replace(TINY, qk_norm="none")
ALL = replace(TINY, **UNPUBLISHED)
KINDS = [TINY, LLAMA, replace(TINY, tie_weights=True), replace(TINY, window=3), ALL]


def build(config: ModernConfig = TINY) -> Modern:
    torch.manual_seed(0)
    model = Modern(config, VOCABULARY).eval()
    with torch.no_grad():  # ten times the initial weights, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


def peer(model: Modern) -> torch.nn.Module:
    """transformers' model with the same weights."""
    import transformers

    config = model.config
    has_norms = config.qk_norm == "before_rotation"
    kind = "Qwen3" if has_norms else "Llama"
    n = range(config.n_layer)
    layers = ["sliding_attention" if config.is_windowed(layer) else "full_attention" for layer in n]
    windows = {"use_sliding_window": config.window is not None, "sliding_window": config.window, "layer_types": layers}
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=config.n_embd, intermediate_size=config.mlp_size,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        head_dim=config.head_size, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_weights,
        max_position_embeddings=config.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base}, **(windows if has_norms else {}),
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    weights = model.state_dict()
    names = {name: name if name == "lm_head.weight" else f"model.{name}" for name in weights}
    missing, unexpected = theirs.load_state_dict({names[name]: weights[name] for name in weights}, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_weights else [])
    return theirs


@pytest.mark.parametrize("config", KINDS[:-1], ids=["Qwen3", "Llama", "Qwen3 tied", "Qwen3 with windows"])
@torch.no_grad()
def test_it_computes_the_logits_of_transformers_models_with_the_same_weights(config):
    model, tokens = build(config), torch.randint(VOCABULARY, (2, 16))
    theirs = peer(model)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    cache, seen = KVCache(16), None  # token by token, theirs with its own cache
    for token in tokens.split(1, dim=1):
        answer = theirs(token, past_key_values=seen, use_cache=True)
        seen = answer.past_key_values
        torch.testing.assert_close(model(token, cache=cache), answer.logits, rtol=1e-5, atol=1e-5)
        cache.length += 1


@pytest.mark.parametrize("config", KINDS)
@torch.no_grad()
def test_packed_documents_get_the_logits_that_each_gets_alone(config):
    model = build(config)
    torch.testing.assert_close(*packed_and_alone(model, VOCABULARY), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[8], [1] * 8, [5, 3], [3, 1, 4]], ids=str)
@pytest.mark.parametrize("config", KINDS)
@torch.no_grad()
def test_a_text_seen_in_pieces_through_a_cache_gets_the_logits_of_the_whole(config, pieces):
    model, tokens = build(config), torch.randint(VOCABULARY, (2, 8))
    cache, logits = KVCache(16), []
    for piece in tokens.split(pieces, dim=1):
        logits.append(model(piece, cache=cache))
        cache.length += piece.shape[1]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=1e-5, atol=1e-5)
    assert cache.layers[0][0].shape == (2, config.n_kv_head, 16, config.head_size)


@pytest.mark.parametrize("config", [TINY, ALL])
def test_a_later_token_never_changes_earlier_logits(config):
    model, embedded = build(config), []
    model.embed_tokens.register_forward_hook(lambda _module, _in, output: embedded.append(output.requires_grad_()))
    logits = model(torch.randint(VOCABULARY, (1, 8)))
    for position in range(8):
        [gradient] = torch.autograd.grad(logits[0, position].square().sum(), embedded[0], retain_graph=True)
        moved_by = gradient[0].abs().sum(-1)  # (T,)
        assert (moved_by[: position + 1] > 0).all() and (moved_by[position + 1 :] == 0).all()


def shown(T, past, documents, window):
    """The mask of T tokens after `past` others in a layer with a window, or without one."""
    tokens = torch.zeros(1, T, dtype=torch.long)
    full = visible(tokens, past, documents)
    return full if window is None else within(window, full, tokens, past, documents)


def test_windowed_layers_see_as_many_tokens_as_their_window_and_the_last_layer_sees_all():
    config = replace(TINY, window=3, window_layers="S")
    assert [config.is_windowed(layer) for layer in range(3)] == [True, True, False]
    assert [replace(config, window_layers="SL").is_windowed(layer) for layer in range(3)] == [True, False, False]
    assert not replace(config, window=None).is_windowed(0)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert shown(4, 0, None, 3).int().tolist() == expected
    assert shown(1, 3, None, 3).int().tolist() == expected[-1:]
    documents = torch.tensor([[0, 1, 1, 1]])
    assert shown(2, 2, documents, 2).int().tolist() == [[[[0, 1, 1, 0], [0, 0, 1, 1]]]]
    assert shown(4, 0, None, 4) is None  # nothing is beyond it


def test_a_window_that_has_not_grown_yet_is_that_of_a_smaller_model_in_training_and_whole_in_evaluation():
    model, small = (Modern(replace(TINY, window=n), 50) for n in (6, 2))
    small.load_state_dict(model.state_dict())
    tokens = torch.arange(16)[None]
    whole = model(tokens)
    model.training_window = 2
    assert torch.equal(model(tokens), small(tokens)) and not torch.equal(model(tokens), whole)
    model.eval()
    assert torch.equal(model(tokens), whole)


@pytest.mark.parametrize("config", KINDS)
@torch.no_grad()
def test_the_untrained_loss_is_the_logarithm_of_the_vocabulary_size(config):
    torch.manual_seed(0)
    model = Modern(replace(config, context_length=128), 50257).eval()
    tokens = torch.randint(50257, (2, 129))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(50257), rel=0.02)


@torch.no_grad()
def test_with_zero_init_each_block_changes_nothing_and_an_untied_head_knows_nothing():
    torch.manual_seed(0)
    model, tokens = Modern(replace(TINY, zero_init=True), VOCABULARY), torch.arange(8)[None]
    x = model.embed_tokens(tokens)
    torch.testing.assert_close(model.hidden(tokens), F.rms_norm(x, (32,), eps=1e-6))
    assert (model(tokens) == 0).all()


def test_initial_matrices_have_the_spread_of_gpt2s():
    torch.manual_seed(0)
    for name, parameter in Modern(replace(ALL, n_embd=128, norm_weights=True), 1000).named_parameters():
        if name.startswith("copying."):
            continue  # see tests/parts/test_copying.py
        if parameter.dim() < 2:
            assert (parameter == 1).all() or name.endswith(("residual_scalars", "follower_scale")), name
        elif parameter.numel() > 2000:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * TINY.n_layer) if into_stream else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name


def test_a_rotation_keeps_lengths_and_makes_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)

    def product(i, j):
        turned = [rotated(x, *(t.double() for t in angles(torch.tensor([p]), 6, 100.0))) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert product(3, 1) == pytest.approx(product(9, 7), rel=1e-6) != pytest.approx(product(4, 1), rel=1e-2)
    assert product(0, 0) == pytest.approx((q * k).sum().item())
    cos, sin = angles(torch.tensor([2]), 4, 100.0)  # 100^(-2 / 4) = 1 / 10 of the first angle
    torch.testing.assert_close(cos, torch.tensor([[math.cos(2), math.cos(0.2), math.cos(2), math.cos(0.2)]]))
    turned = rotated(torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4), cos, sin)  # numbers 0 and 2 are one pair
    torch.testing.assert_close(turned.flatten(), torch.tensor([math.cos(2), 0.0, math.sin(2), 0.0]))


@torch.no_grad()
def test_logits_are_capped_by_a_tanh():
    model, tokens = build(), torch.randint(VOCABULARY, (1, 8))
    plain, model.logit_softcap = model(tokens), 15.0
    torch.testing.assert_close(model(tokens), 15 * torch.tanh(plain / 15))
    model.lm_head.weight[:] = 0
    hidden = torch.zeros(1, 32)
    hidden[0, 0], model.lm_head.weight[0, 0] = 1, 30
    assert model.logits(hidden)[0, 0].item() == pytest.approx(14.4604, abs=1e-4)


def attention_inputs(config):
    """The attention of the last layer, an input, value embeddings, and the rotation."""
    torch.manual_seed(1)
    values = torch.randn(2, 8, config.n_kv_head * config.head_size) if config.value_embeddings else None
    rotation = angles(torch.arange(8), config.head_size, config.rope_base)
    return build(config).layers[-1].self_attn, torch.randn(2, 8, config.n_embd), values, rotation


@pytest.mark.parametrize("config", KINDS)
@torch.no_grad()
def test_attention_equals_a_reference_that_loops_over_heads(config):
    attention, x, values, rotation = attention_inputs(config)
    D, eps = config.head_size, config.norm_eps
    turns = torch.arange(8)[:, None] * config.rope_base ** (-2 * torch.arange(D // 2) / D)  # (8, D / 2)

    def turned(t, weight):  # (2, 8, D) of one head
        def norm(t, weight):
            return t / (t.square().mean(-1, keepdim=True) + eps).sqrt() * weight

        t = norm(t, weight.weight) if config.qk_norm == "before_rotation" else t
        pairs = torch.complex(t[..., : D // 2], t[..., D // 2 :]) * torch.polar(torch.ones_like(turns), turns)
        t = torch.cat([pairs.real, pairs.imag], dim=-1)
        return 1.2 * norm(t, 1.0) if config.qk_norm == "after_rotation" else t

    outputs = []
    for head in range(config.n_head):
        group = head // (config.n_head // config.n_kv_head)
        here, shared = slice(head * D, (head + 1) * D), slice(group * D, (group + 1) * D)
        q = turned((x @ attention.q_proj.weight.T)[..., here], getattr(attention, "q_norm", None))
        k = turned((x @ attention.k_proj.weight.T)[..., shared], getattr(attention, "k_norm", None))
        v = (x @ attention.v_proj.weight.T)[..., shared]
        if values is not None:
            gate = 3 / (1 + torch.exp(-(x[..., :12] @ attention.value_gate.weight[group])))
            v = v + gate[..., None] * values[..., shared]
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    expected = torch.cat(outputs, dim=-1) @ attention.o_proj.weight.T
    torch.testing.assert_close(attention(x, values, rotation, None, None), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_kinds_of_mlp_are_their_formulas():
    x = torch.randn(2, 8, 32)
    gated, squared = build().layers[0].mlp, build(replace(TINY, activation="relu2")).layers[0].mlp
    gate, up = x @ gated.gate_proj.weight.T, x @ gated.up_proj.weight.T
    torch.testing.assert_close(gated(x), (gate * torch.sigmoid(gate) * up) @ gated.down_proj.weight.T)
    torch.testing.assert_close(squared(x), (x @ squared.up_proj.weight.T).clamp(0) ** 2 @ squared.down_proj.weight.T)
    assert not hasattr(squared, "gate_proj")


@torch.no_grad()
def test_each_block_reads_the_stream_and_the_embedding_in_the_shares_of_its_scalars():
    torch.manual_seed(0)
    config = replace(TINY, residual_scalars=True, zero_init=True)
    model, tokens = Modern(config, VOCABULARY), torch.arange(8)[None]
    x0 = x = F.rms_norm(model.embed_tokens(tokens), (32,), eps=1e-6)
    for layer, (r, s) in enumerate([(1.15, 0.2), (1.1, 0.125), (1.05, 0.05)]):
        torch.testing.assert_close(model.layers[layer].residual_scalars, torch.tensor([r, s]))
        x = r * x + s * x0
        model.layers[layer].residual_scalars[:] = torch.tensor([r, s])
    torch.testing.assert_close(model.hidden(tokens), F.rms_norm(x, (32,), eps=1e-6))


@torch.no_grad()
def test_blocks_read_the_mean_embedding_of_what_followed_the_same_token_before_in_its_document():
    torch.manual_seed(0)
    model = Modern(replace(TINY, induction=True, zero_init=True), VOCABULARY)
    e = model.embed_tokens.weight
    a, b, c = torch.arange(3)
    tokens, documents = torch.stack([a, b, a, c, a, a, c, b])[None], torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]])
    nothing = torch.zeros(32)
    expected = [nothing, nothing, e[b], nothing, (e[b] + e[c]) / 2, (e[b] + e[c] + e[a]) / 3, nothing, nothing]
    x = e[tokens[0]] + (0.6 + 0.1 + 0.1) * torch.stack(expected)
    torch.testing.assert_close(model.hidden(tokens, documents=documents)[0], F.rms_norm(x, (32,), eps=1e-6))
    in_one = model.hidden(tokens)[0, 6]  # without documents a has followed c
    torch.testing.assert_close(in_one, F.rms_norm(e[c] + 0.8 * e[a], (32,), eps=1e-6))


def test_every_second_layer_has_value_embeddings_the_last_among_them():
    model = Modern(replace(TINY, n_layer=4, value_embeddings=True), VOCABULARY)
    assert list(model.value_embeddings) == ["1", "3"]
    assert [hasattr(block.self_attn, "value_gate") for block in model.layers] == [False, True, False, True]


def test_dropout_acts_while_training_and_never_in_evaluation():
    model, tokens = build(replace(TINY, dropout=0.5)), torch.randint(VOCABULARY, (1, 8))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("config", KINDS)
def test_gradient_checkpointing_changes_no_gradient(config):
    gradients = []
    for checkpointing in (False, True):
        model = build(replace(config, dropout=0.1)).train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        model(torch.arange(8)[None]).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_embeddings_lie_below_the_blocks_and_scalars_are_not_decayed():
    model = build(ALL)
    depth = depths(model)
    assert depth["embed_tokens.weight"] == depth["value_embeddings.0.weight"] == 4 and depth["lm_head.weight"] == 0
    assert depth["layers.0.residual_scalars"] == depth["layers.0.self_attn.value_gate.weight"] == 3
    decayed, kept = optim.decay_groups(model.named_parameters(), 0.1)
    assert [p.shape for p in kept["params"]] == [*[(2,), (1,)] * 3, (3,)]  # the last of `copying`
    assert len(decayed["params"]) == len(list(model.parameters())) - 7


@pytest.mark.exhaustive  # loading the compiler takes seconds
@pytest.mark.parametrize("config", KINDS)
def test_the_compiler_takes_a_block_as_one_graph(config):
    def run(block):
        rotation = angles(torch.arange(8), 6, 100.0)
        x, mask = torch.ones(2, 8, 32).cumsum(1), shown(8, 0, None, config.window)
        values = torch.ones(2, 8, 12) if config.value_embeddings else None
        embedded, followers = x if config.residual_scalars else None, x if config.induction else None
        return block(x, embedded, followers, values, rotation, mask, None)

    block = build(config).layers[-1]
    torch.testing.assert_close(run(torch.compile(block, backend="eager", fullgraph=True)), run(block))


def test_more_tokens_than_the_context_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="17 tokens exceed the context length 16"):
        build()(torch.zeros(1, 17, dtype=torch.long))


def test_heads_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="n_head 4 is not divisible by n_kv_head 3"):
        Modern(replace(TINY, n_kv_head=3), VOCABULARY)


@pytest.mark.parametrize("size", ["tiny", "mini", "small"])
def test_each_size_has_the_parameters_of_gpt2s_of_that_name_within_a_hundredth(size):
    with torch.device("meta"):
        counts = [
            kind(loaded(f"model={name}").model, 50257).n_parameters()
            for kind, name in ((GPT, size), (Modern, f"modern_{size}"))
        ]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_under_autocast_its_norms_and_rotations_are_of_float32():
    """The logits differ from those of float32 by bfloat16's rounding of the products, 2^-8, and nothing worse."""
    model, tokens = build(replace(TINY, context_length=1024)), torch.randint(VOCABULARY, (1, 1024))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stream = model.hidden(tokens)
    assert stream.dtype == torch.float32
    with torch.no_grad():
        assert (stream - model.hidden(tokens)).square().mean().sqrt() < 0.05
