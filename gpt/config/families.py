"""Registers the families of models: the settings of each and the class that is built from them.

Another architecture needs a dataclass and a line in MODELS here, a module with its class, and a file in conf/model/.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from gpt.config.fields import BelowOne, Count, Even, Flag, Pattern, Positive, Text, Variants, Whole, section

# Keys, what must not be, and the phrase for it: {0}, {1}, ... are the values in the order of the keys.
Check = tuple[tuple[str, ...], Callable[..., bool], str]


@section
class ModelConfig:
    """The settings that a model of any family has.

    linear_layers: names of a block's nn.Linear that may have adapters (finetune=lora); empty: none of them.
    lora_targets: those of them that have one where finetune.targets does not say.
    checks: values that are fine alone and wrong together.
    """

    linear_layers: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ()
    checks: ClassVar[tuple[Check, ...]] = ()

    family: str
    name: Text
    n_layer: Count
    n_head: Count
    n_embd: Count
    context_length: Count
    dropout: BelowOne
    tie_weights: Flag

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees but a window of the tokens before."""
        return False

    def unpublished(self) -> list[str]:
        """The settings, as key=value, that no class of transformers has; with one of them a model is not exported."""
        return []


@section
class GPT2Config(ModelConfig):
    """The settings of a GPT-2 (Radford et al., 2019)."""

    linear_layers: ClassVar[tuple[str, ...]] = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    lora_targets: ClassVar[tuple[str, ...]] = ("attn.c_attn",)
    checks: ClassVar[tuple[Check, ...]] = (
        (("model.n_embd", "model.n_head"), lambda d, h: d % h > 0,
         "model.n_embd {0} is not divisible by model.n_head {1}"),
    )  # fmt: skip

    family: Literal["gpt2"]
    gelu: Literal["tanh", "exact"]


@section
class ModernConfig(ModelConfig):
    """The settings of a model of today. Where each comes from: conf/model/modern_tiny.yaml."""

    linear_layers: ClassVar[tuple[str, ...]] = (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )  # fmt: skip
    lora_targets: ClassVar[tuple[str, ...]] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    checks: ClassVar[tuple[Check, ...]] = (
        (("model.n_head", "model.n_kv_head"), lambda h, k: h % k > 0,
         "model.n_head {0} is not divisible by model.n_kv_head {1}"),
        (("finetune.targets", "model.activation"), lambda t, a: "mlp.gate_proj" in t and a != "swiglu",
         "finetune.targets {0}: with model.activation {1} there is no mlp.gate_proj"),
    )  # fmt: skip

    family: Literal["modern"]
    n_kv_head: Count
    head_size: Even
    mlp_size: Count
    activation: Literal["swiglu", "relu2"]
    norm_eps: Positive
    norm_weights: Flag
    rope_base: Positive
    qk_norm: Literal["none", "before_rotation", "after_rotation"]
    window: Count | None
    window_layers: Pattern
    logit_softcap: Positive | None
    value_embeddings: Flag
    residual_scalars: Flag
    zero_init: Flag
    induction: Flag = False  # runs of before it was there do not say it
    copy_order: Whole | None = None

    def unpublished(self) -> list[str]:
        """What neither LlamaForCausalLM nor Qwen3ForCausalLM has."""
        has_window = any(map(self.is_windowed, range(self.n_layer)))
        differs = {
            "activation": self.activation != "swiglu",
            "norm_weights": not self.norm_weights,
            "qk_norm": self.qk_norm == "after_rotation",
            "window": has_window and self.qk_norm == "none",  # only Qwen3 has layers with one, and it has these norms
            "logit_softcap": self.logit_softcap is not None,
            "value_embeddings": self.value_embeddings,
            "residual_scalars": self.residual_scalars,
            "induction": self.induction,
            "copy_order": self.copy_order is not None,
        }
        found = {key: f"model.{key}={str(getattr(self, key)).lower()}" for key, is_other in differs.items() if is_other}
        if "window" in found:
            found["window"] += " with model.qk_norm=none"
        return list(found.values())

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees `window` tokens only; the last one never does."""
        is_short = self.window_layers[layer % len(self.window_layers)] == "S"
        return self.window is not None and is_short and layer < self.n_layer - 1


@dataclass(frozen=True)
class Family:
    """An architecture: its settings and, as module:attribute because that module imports torch, its class."""

    config: type[ModelConfig]
    model: str


MODELS: dict[str, Family] = {
    "gpt2": Family(GPT2Config, "gpt.model:GPT"),
    "modern": Family(ModernConfig, "gpt.modern:Modern"),
}

# The settings of any family that is registered by the time a configuration is checked.
AnyModelConfig = Annotated[ModelConfig, Variants("family", lambda: {name: f.config for name, f in MODELS.items()})]


def lora_targets(family: str) -> list[str]:
    """The layers of a family that have adapters by default; none of a family that does not exist."""
    config = MODELS[family].config if family in MODELS else ModelConfig
    return list(config.lora_targets or config.linear_layers)


def model_class(family: str) -> type:
    """The class that a family's models are built with."""
    module, _, attribute = MODELS[family].model.partition(":")
    return getattr(importlib.import_module(module), attribute)
