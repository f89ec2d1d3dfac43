"""Counts what a model and its steps take by running them on tensors that have a shape and a device, and no content.

So an architecture needs no second description: operations and bytes are those of its own module.
"""

import contextlib
import math
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gpt.config.data import DataConfig
from gpt.config.families import ModelConfig
from gpt.config.schema import FinetuneConfig, TrainConfig
from gpt.machine.sizes import ByValue, NotDrawn, build
from gpt.model import LanguageModel


@dataclass(frozen=True)
class StepCounts:
    """Of the forward and backward pass of one micro-batch, the head and its loss left out."""

    tokens: int
    bytes: int  # at the fullest moment, gradients included, the weights themselves not
    forward: int  # multiplications and additions
    backward: int  # what gradient checkpointing computes again included


def micro_batch(
    cfg: TrainConfig, vocab_size: int, rows: int, kind: str, dtype: torch.dtype, shards: int = 1
) -> StepCounts:
    """Counts of a run's micro-batch of `rows` rows: of a later one of a step, where a step has several."""
    in_step = cfg.train.rows_per_step(cfg.model.context_length)
    return step(
        cfg.model, cfg.finetune, vocab_size, min(rows, in_step), is_later=rows < in_step,
        masked=is_masked(cfg.data), kind=kind, dtype=dtype, checkpointing=cfg.train.gradient_checkpointing,
        shards=shards,
    )  # fmt: skip


def is_masked(data: DataConfig) -> bool:
    """Whether rows hold several documents each, so that attention needs a mask."""
    return data.kind != "text" and data.batching == "packed"


@ByValue
def step(
    cfg: ModelConfig, chosen: FinetuneConfig | None, vocab_size: int, rows: int = 1, is_later: bool = False,
    masked: bool = False, kind: str = "cpu", dtype: torch.dtype = torch.float32, checkpointing: bool = False,
    shards: int = 1,
) -> StepCounts:  # fmt: skip
    """Counts of a micro-batch of `rows` rows on a `kind` of device, or on a CPU where there is no such device.

    `is_later`: it is not the first of its step, so that there are gradients already. `masked`: its rows hold several
    documents each. `shards`: so many ranks share the weights, see gpt/machine/sharding.py.
    """
    if shards > 1:
        from gpt.machine import sharding  # here, as other runs need nothing of torch.distributed

    with fake_tensors(), torch.device(kind if is_here(kind) else "cpu"):
        with NotDrawn():
            model = build(cfg, chosen, vocab_size).train()
        model.gradient_checkpointing = checkpointing
        if shards > 1:
            for layer in chain.from_iterable(sharding.gathered_together(model)[0]):  # whole ones are in `dtype`
                for name, weight in layer.named_parameters(recurse=False):
                    setattr(layer, name, torch.nn.Parameter(weight.detach().to(dtype), weight.requires_grad))
        return run(model, rows, is_later, masked, dtype, shards)


def is_here(kind: str) -> bool:
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(kind, lambda: True)()


def run(
    model: LanguageModel, rows: int, is_later: bool, masked: bool, dtype: torch.dtype, shards: int = 1
) -> StepCounts:
    """Counts of a micro-batch, which goes forward and backward as in gpt/loop.py."""
    kind, T = model.head.device.type, model.config.context_length
    tokens = torch.zeros(rows, T, dtype=torch.long)
    positions, documents = (tokens.clone(), tokens.clone()) if masked else (None, None)
    scored = torch.zeros(rows * T, dtype=torch.long)
    with Meter() as meter, torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        own_head = () if model.config.tie_weights else {model.head}  # left out, see StepCounts
        trained = [weight for weight in model.parameters() if weight.requires_grad and weight not in own_head]
        if shards > 1:
            kept = share_gradients(trained, shards, is_later)  # noqa: F841  in use until the end
        elif is_later:  # what the first one leaves: gradients, and autocast's copies of weights, with their graph
            for weight in trained:
                weight.grad = torch.empty_like(weight)
            if dtype != torch.float32:
                model.hidden(tokens, positions, documents)
        meter.peak, before = 0, meter.operations
        stream = model.hidden(tokens, positions, documents).flatten(0, 1).index_select(0, scored)
        forward = meter.operations - before
        gradient = torch.empty_like(stream)
        with torch.autocast(kind, enabled=False):
            stream.backward(gradient)
    return StepCounts(rows * T, meter.peak, forward, meter.operations - before - forward)


def share_gradients(trained: list[torch.nn.Parameter], n: int, is_later: bool) -> list[Tensor]:
    """From now on a gradient is let go of as soon as it is known. Returns what stays: one of `n` parts of its rows in
    float32, or in a later micro-batch all of them, from the beginning."""
    kept = [torch.empty(weight.shape, device=weight.device) for weight in trained if is_later]

    def known(weight: torch.nn.Parameter) -> None:
        weight.grad = None
        if not is_later:
            kept.append(torch.empty(-(-len(weight) // n), *weight.shape[1:], device=weight.device))

    for weight in trained:
        weight.register_post_accumulate_grad_hook(known)
    return kept


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of all tensors that were made since and are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.peak = 0, 0
        self._in_use: dict[int, int] = {}  # bytes of each storage
        self._sum = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if count := OPERATIONS.get(function.overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=results)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(results):
            storage = tensor.untyped_storage()
            identity = storage._cdata
            if identity not in given and identity not in self._in_use:
                self._in_use[identity] = storage.nbytes()
                self._sum += storage.nbytes()
                weakref.finalize(storage, self._freed, identity).atexit = False
        self.peak = max(self.peak, self._sum)
        return results

    def _freed(self, identity: int) -> None:
        self._sum -= self._in_use.pop(identity)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or results of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """q k^T and its product with v, whatever of it a mask leaves out."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Tensor, *inputs: Any, **more: Any) -> int:
    """As in Chowdhery et al., "PaLM", 2022, appendix B: what a kernel computes again does not count."""
    return 2 * _attention(*inputs)


# torch's own table lacks the CPU's attention, and counts some kernels' repeated work.
OPERATIONS = flop_registry | {
    getattr(torch.ops.aten, name): _attention_backward if name.endswith("_backward") else _attention
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
    )
}  # fmt: skip


class _Settings:
    """Stands in for torch._dynamo.config."""

    fake_tensor_cache_enabled = True

    def __getattr__(self, name: str) -> None:
        return None  # all others are off


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, new tensors have no content. Saves the 0.7 seconds that it takes to load torch._dynamo, of which these
    tensors need a setting, and a function that does nothing where nothing is compiled."""
    wrapped: list[Callable] = []

    def disable(function: Callable, recursive: bool = True, wrapping: bool = True) -> Callable:
        wrapped.append(function)
        return function

    stand_ins = {}
    if "torch._dynamo" not in sys.modules:
        source = types.SimpleNamespace(ConstantSource=str, RandomValueSource=int)  # of tensors made of given numbers
        torch._dynamo = types.SimpleNamespace(disable=disable, config=_Settings(), source=source)
        stand_ins = {"torch._dynamo": torch._dynamo, "torch._dynamo.config": torch._dynamo.config}
        stand_ins["torch._dynamo.source"] = source
    sys.modules |= stand_ins
    try:
        with FakeTensorMode():
            yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        if stand_ins:
            del torch._dynamo
        for function in wrapped:  # where torch remembers what `disable` gave it
            function.__dict__.pop("__dynamo_disable", None)
