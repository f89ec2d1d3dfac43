"""Translates between config.json of transformers' Llama and Qwen3 and the settings of gpt/modern.py. No torch.

The two differ in the norms of queries and keys, which Qwen3 has, and in Qwen3's layers with a window.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.families import ModernConfig
from gpt.config.fields import first_error
from gpt.errors import CHECKPOINT, UserError, unusable

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What config.json may say that is not in our model, and the values with which that makes no difference.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,),
}  # fmt: skip
ROTATION = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}  # the plain one
# Whole numbers that have to be there.
SHAPE = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings",
    "vocab_size",
)  # fmt: skip


def read(path: Path, config: dict[str, Any], n: dict[str, int]) -> ModernConfig:
    """The settings in the config.json at `path`, whose content is `config`, and whose values of SHAPE are `n`. Values
    that are not there are transformers' own. Raises UserError (3), for variants with the keys by which they are that.
    """
    is_qwen3 = config["model_type"] == "qwen3"
    try:
        rotation = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        others = [f"{key} {config[key]}" for key, plain in FIXED.items() if config.get(key, plain[0]) not in plain]
        others += [
            f"rope {key} {rotation[key]}" for key in ROTATION if rotation.get(key, ROTATION[key]) != ROTATION[key]
        ]
        kinds = layer_kinds(config) if is_qwen3 else []
        if kinds[-1:] == ["S"]:
            others.append("a window in the last layer")
        model = ModernConfig(
            family="modern", name="model", n_layer=n["num_hidden_layers"], n_head=n["num_attention_heads"],
            n_embd=n["hidden_size"], context_length=n["max_position_embeddings"], dropout=0.0,
            tie_weights=config.get("tie_word_embeddings", False),
            n_kv_head=config.get("num_key_value_heads") or n["num_attention_heads"],
            head_size=config.get("head_dim") or (128 if is_qwen3 else n["hidden_size"] // n["num_attention_heads"]),
            mlp_size=n["intermediate_size"], activation="swiglu", norm_eps=config.get("rms_norm_eps", 1e-6),
            norm_weights=True, rope_base=float(rotation.get("rope_theta", config.get("rope_theta", 10_000.0))),
            qk_norm="before_rotation" if is_qwen3 else "none",
            window=config["sliding_window"] if "S" in kinds else None,
            window_layers="".join(kinds) if "S" in kinds else "L", logit_softcap=None, value_embeddings=False,
            residual_scalars=False, zero_init=False,
        )  # fmt: skip
    except (ValidationError, ValueError, TypeError, OverflowError) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else str(error)
        raise unusable(path, reason) from error
    if others:
        what = f"another kind of {CLASSES[config['model_type']].removesuffix('ForCausalLM')}: {', '.join(others)[:300]}"
        raise UserError(what, str(path), "gpt/modern.py computes something else", CHECKPOINT)
    return model


def layer_kinds(config: dict[str, Any]) -> list[str]:
    """S for each layer of a Qwen3 that has a window, L for each that has none, as transformers takes them."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return []
    n_layer, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    types = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(min(n_layer, 2**12))]
    if len(types) != n_layer:
        raise ValueError(f"layer_types are {len(types)}, num_hidden_layers {n_layer}")
    return ["S" if name == "sliding_attention" else "L" for name in types]


def kind_of(config: ModernConfig) -> str:
    """The model_type of a model that has a class there."""
    return "llama" if config.qk_norm == "none" else "qwen3"


def written(config: ModernConfig, vocab_size: int, std: float) -> dict[str, Any]:
    """The content of config.json, without the ids of tokens, of a model that has a class there. `std`: of the random
    weights that it began with."""
    kind = kind_of(config)
    common = {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "vocab_size": vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embd, "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "head_dim": config.head_size,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_bias": False,
        "attention_dropout": config.dropout,
        "initializer_range": std,
        "rope_theta": config.rope_base,  # in transformers 4, which is what llama.cpp reads, too
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},  # in 5
        "tie_word_embeddings": config.tie_weights,
        "use_cache": True,
        "dtype": "float32", "torch_dtype": "float32",  # in transformers 5 and 4
    }  # fmt: skip
    if kind == "llama":
        return common | {"mlp_bias": False}
    kinds = ["sliding_attention" if config.is_windowed(i) else "full_attention" for i in range(config.n_layer)]
    is_windowed = "sliding_attention" in kinds
    window = {"use_sliding_window": is_windowed, "sliding_window": config.window if is_windowed else None}
    return common | window | {"layer_types": kinds}
