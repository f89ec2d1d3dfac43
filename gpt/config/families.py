"""Registers the families of models: the settings of each and the class that is built from them.

Another architecture needs a dataclass and a line in MODELS here, a module with its class, and a file in conf/model/.
"""

import importlib
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from gpt.config.fields import BelowOne, Count, Flag, Text, Variants, section


@section
class ModelConfig:
    """The settings that a model of any family has.

    linear_layers: names of a block's nn.Linear that may have adapters (finetune=lora); empty: none of them.
    """

    linear_layers: ClassVar[tuple[str, ...]] = ()

    family: str
    name: Text
    n_layer: Count
    n_head: Count
    n_embd: Count
    context_length: Count
    dropout: BelowOne
    tie_weights: Flag


@section
class GPT2Config(ModelConfig):
    """The settings of a GPT-2 (Radford et al., 2019)."""

    linear_layers: ClassVar[tuple[str, ...]] = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    family: Literal["gpt2"]
    gelu: Literal["tanh", "exact"]


@dataclass(frozen=True)
class Family:
    """An architecture: its settings and, as module:attribute because that module imports torch, its class."""

    config: type[ModelConfig]
    model: str


MODELS: dict[str, Family] = {"gpt2": Family(GPT2Config, "gpt.model:GPT")}

# The settings of any family that is registered by the time a configuration is checked.
AnyModelConfig = Annotated[ModelConfig, Variants("family", lambda: {name: f.config for name, f in MODELS.items()})]


def model_class(family: str) -> type:
    """The class that a family's models are built with."""
    module, _, attribute = MODELS[family].model.partition(":")
    return getattr(importlib.import_module(module), attribute)
