"""Counts the numbers in the weights of a model, by its own module, without making them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpt import finetune, optim
from gpt.config.families import ModelConfig, model_class
from gpt.config.optimizers import OptimizerConfig
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


@ByValue
def count_gathered(cfg: ModelConfig, chosen: FinetuneConfig | None, vocab_size: int) -> tuple[int, int]:
    """Numbers in the weights that parallel=fsdp gathers together: in the linear layers of a block, in embeddings."""
    from gpt.machine import sharding  # here, as other runs need nothing of torch.distributed

    with torch.device("meta"), NotDrawn():
        blocks, embeddings = sharding.gathered_together(build(cfg, chosen, vocab_size))

    def numbers(layers: Iterable[torch.nn.Module]) -> int:
        return sum(weight.numel() for weight in {weight for layer in layers for weight in layer.parameters()})

    return max(map(numbers, blocks)), numbers(embeddings)


@ByValue
def state_bytes(
    cfg: ModelConfig, chosen: FinetuneConfig | None, vocab_size: int, optimizer: OptimizerConfig, ema: float | None
) -> int:
    """Bytes of the state that an optimizer, and with `ema` the mean of the weights, keeps for the trained weights of a
    model: it is asked what it keeps for small ones, after a step, and their dimensions are replaced by the real ones.
    """
    with torch.device("meta"), NotDrawn():
        model = build(cfg, chosen, vocab_size)
    with NotDrawn():
        small = Miniature()
    small_optimizer = optim.build(small, optimizer, ema=ema)
    for parameter in small.parameters():
        parameter.grad = torch.ones_like(parameter)
    small_optimizer.step()
    kept = {}
    for parameter, kind in kinds(small).items():
        states = [part.state[parameter] for part in optim.parts(small_optimizer).values() if parameter in part.state]
        values = [value for state in states for value in state.values()]
        tensors = [item for value in values for item in (value if isinstance(value, list) else [value])]
        tensors = [item for item in tensors if isinstance(item, torch.Tensor) and item.dim()]
        kept[kind] = parameter.shape, [(tensor.shape, tensor.element_size()) for tensor in tensors]
    total = 0
    for parameter, kind in kinds(model).items():
        own = [len(parameter), parameter.numel() // len(parameter)]
        small_shape, tensors = kept[kind]
        real = dict(zip(small_shape, own, strict=False))
        total += sum(size * math.prod(real.get(n, n) for n in shape) for shape, size in tensors)
    return total


def kinds(model: Any) -> dict[torch.nn.Parameter, tuple[bool, bool]]:
    """Of each trained parameter, whether it is in a block and whether it is a matrix: what builders tell apart."""
    inside = set(model.blocks.parameters())
    return {p: (p in inside, p.dim() > 1) for p in model.parameters() if p.requires_grad}


class Miniature(torch.nn.Module):
    """One parameter of each of the `kinds` of a model; no two dimensions of a matrix are equal, and none is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(7, 5)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 7)])
        self.ln_f = torch.nn.LayerNorm(5)
        self.head = torch.nn.Parameter(torch.empty(7, 5))


class NotDrawn(TorchFunctionMode):
    """Leaves out random initial weights, which take seconds. Memory that nobody writes to is not even taken."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))
