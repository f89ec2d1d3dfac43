"""config.json of Llama and Qwen3 against our settings, both ways."""

import json
from dataclasses import replace

import pytest
import transformers

from gpt.errors import UserError
from gpt.machine.sizes import NotDrawn
from gpt.modern import Modern
from gpt.weights import llama_config, source

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "vocab_size": 320, "head_dim": 16,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
# Qwen/Qwen3-0.6B, as transformers 4 wrote it.
QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
    "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def read(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return source.of_transformers(path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("Qwen3", {"rms_norm_eps": 1e-5}),
        ("Qwen3", WINDOWS | {"layer_types": KINDS}),
    ],
)
def test_settings_of_transformers_are_the_same_after_a_way_there_and_back(kind, settings, tmp_path):
    theirs = getattr(transformers, f"{kind}Config")(**SMALL | settings)
    ours = read(tmp_path, theirs.to_dict()).model
    again = getattr(transformers, f"{kind}Config")(**llama_config.written(ours, 320, 0.02)).to_dict()
    differing = {key for key, value in theirs.to_dict().items() if again.get(key) != value}
    assert differing <= {"architectures", "dtype", "max_window_layers"}
    assert read(tmp_path, again).model == ours and not ours.unpublished()


def test_a_published_configuration_has_the_parameters_that_its_model_has(tmp_path):
    """Qwen3-0.6B: 596,049,920 of them, 440,466,432 of which are not in the embedding (its card: 0.6 and 0.44 billion).

    A layer: queries and their output 2 * 1024 * 2048, keys and values 2 * 1024 * 1024, the MLP 3 * 1024 * 3072, norms
    2 * 1024 + 2 * 128; 28 of these, a norm of 1024, and an embedding of 151,936 * 1024."""
    found = read(tmp_path, QWEN3)
    with NotDrawn():
        model = Modern(found.model, found.vocab_size)
    layer = 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    assert model.n_parameters() == 28 * layer + 1024 + 151_936 * 1024 == 596_049_920
    assert (found.model.rope_base, found.context_length, found.family) == (1e6, 40960, "modern")


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "Llama: attention_bias True, mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "another kind of Llama: hidden_act gelu"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "kind of Llama: rope rope_type llama3"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("qwen3", WINDOWS | {"max_window_layers": 2}, "another kind of Qwen3: a window in the last layer"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "another kind of Qwen3: quantization_config {'bits': 4}"),
        ("qwen3", {"head_dim": 15}, "config.json damaged (head_size"),
        ("qwen3", {"num_hidden_layers": "4"}, "num_hidden_layers is '4', not a whole number"),
        ("qwen3", {"hidden_size": None}, "config.json damaged"),
        ("llama", {"vocab_size": 0}, "vocab_size is 0, not a whole number from 1 on"),
        ("llama", {"rope_parameters": [1]}, "config.json damaged"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "config.json damaged"),
        ("qwen3", WINDOWS | {"layer_types": 5}, "config.json damaged"),
        ("qwen3", WINDOWS | {"layer_types": KINDS[:-1]}, "damaged (layer_types are 3, num_hidden_layers 4)"),
        ("qwen2", {}, "a qwen2 model, not GPT-2, Llama or Qwen3"),
        ("qwen3_moe", {}, "a qwen3_moe model, not GPT-2, Llama or Qwen3"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_compute_is_refused_by_its_key(kind, changes, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, SMALL | {"model_type": kind} | changes)
    assert expected in caught.value.what and caught.value.code == 3 and "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="num_hidden_layers is None, not a whole number"):
        read(tmp_path, {"model_type": "llama"})


def test_settings_without_a_public_class_are_all_named(tmp_path):
    ours = read(tmp_path, SMALL | {"model_type": "llama"}).model
    odd = replace(
        ours, activation="relu2", norm_weights=False, window=8, window_layers="SL", logit_softcap=15.0,
        value_embeddings=True, residual_scalars=True, induction=True, copy_order=2,
    )  # fmt: skip
    assert odd.unpublished() == [
        "model.activation=relu2", "model.norm_weights=false", "model.window=8 with model.qk_norm=none",
        "model.logit_softcap=15.0", "model.value_embeddings=true", "model.residual_scalars=true",
        "model.induction=true", "model.copy_order=2",
    ]  # fmt: skip
    assert replace(ours, qk_norm="after_rotation").unpublished() == ["model.qk_norm=after_rotation"]
