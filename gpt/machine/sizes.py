"""Counts the numbers in the weights of a model, by its own module, without making them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpt import finetune
from gpt.config.families import ModelConfig, model_class
from gpt.config.schema import FinetuneConfig
from gpt.model import LanguageModel


@dataclass(frozen=True)
class Sizes:
    """Numbers in the weights of a model."""

    parameters: int  # adapters not counted
    held: int  # adapters counted
    trained: int
    head: int
    head_is_trained: bool


class ByValue:
    """Remembers the results of a function by what its arguments say: a section with a list in it has no hash."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.results = function, {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        key = repr((arguments, named))
        if key not in self.results:
            self.results[key] = self.function(*arguments, **named)
        return self.results[key]


@ByValue
def count_sizes(cfg: ModelConfig, chosen: FinetuneConfig | None, vocab_size: int) -> Sizes:
    """Sizes of the model of which `chosen` is trained."""
    with torch.device("meta"), NotDrawn():
        model = build(cfg, chosen, vocab_size)
        return Sizes(
            parameters=finetune.n_plain(model),
            held=model.n_parameters(),
            trained=finetune.n_trained(model),
            head=model.head.numel(),
            head_is_trained=model.head.requires_grad,
        )


def build(cfg: ModelConfig, chosen: FinetuneConfig | None, vocab_size: int) -> LanguageModel:
    """The model as it is trained."""
    model = model_class(cfg.family)(cfg, vocab_size)
    finetune.prepare(model, chosen, seed=0)
    return model


class NotDrawn(TorchFunctionMode):
    """Leaves out random initial weights, which take seconds. Memory that nobody writes to is not even taken."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))
