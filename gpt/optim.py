"""Builds optimizers and their parameter groups, and computes the learning rate of each step."""

import importlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config.optimizers import AdamWConfig, MuonConfig, OptimizerConfig
from gpt.config.schema import FinetuneConfig, ScheduleConfig
from gpt.errors import UserError
from gpt.finetune import lr_scales
from gpt.model import LanguageModel
from gpt.terminal.console import count

Groups = list[dict[str, Any]]
Scale = Callable[[str], float]  # of the learning rate, by the name of the weight
JSON = 0  # the first byte of a state that is no tensor, in a checkpoint; no JSON begins with it


def without_compiler_hooks(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without torch's wrappers around its methods. They only tell torch.compile not to trace inside,
    and import it for that, which takes 0.9 s of each start (experiments/speed); here no optimizer is compiled."""
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


AdamW, Muon = map(without_compiler_hooks, (torch.optim.AdamW, torch.optim.Muon))


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    """Two groups: matrices and embeddings, which are decayed, and biases and norms, which are not."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def scaled_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, scale: Scale
) -> Groups:
    """The `decay_groups` of each learning rate, `lr` times the scale of a weight's name; the largest rate first."""
    named = defaultdict(list)
    for name, parameter in parameters:
        named[scale(name)].append((name, parameter))
    return [
        group | {"lr": s * lr} for s in sorted(named, reverse=True) for group in decay_groups(named[s], weight_decay)
    ]


def build_adamw(model: LanguageModel, cfg: AdamWConfig, scale: Scale) -> torch.optim.Optimizer:
    groups = scaled_groups(model.named_parameters(), cfg.lr, cfg.weight_decay, scale)
    return AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def build_torch(
    kind: type[torch.optim.Optimizer], model: LanguageModel, cfg: Any, scale: Scale
) -> torch.optim.Optimizer:
    """An optimizer that takes its settings by the names that they have in its dataclass."""
    settings = {key: value for key, value in vars(cfg).items() if key != "name"}
    groups = scaled_groups(model.named_parameters(), cfg.lr, settings.pop("weight_decay", 0.0), scale)  # Rprop has none
    return without_compiler_hooks(kind)(groups, **settings)


class MuonWithAdamW:
    """Muon for the matrices inside the blocks, AdamW for everything else, under the interface of one optimizer.

    When one of them would have no parameters, only the other exists.
    """

    def __init__(self, model: LanguageModel, cfg: MuonConfig, scale: Scale) -> None:
        named = list(model.named_parameters())
        inside = {p for p in model.blocks.parameters() if p.dim() == 2}
        matrices = [(name, p) for name, p in named if p in inside]
        others = [(name, p) for name, p in named if p not in inside]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if groups := scaled_groups(matrices, cfg.lr, cfg.weight_decay, scale):
            self.parts["muon"] = Muon(groups, momentum=cfg.momentum)
        if groups := scaled_groups(others, cfg.adamw_lr, cfg.weight_decay, scale):
            self.parts["adamw"] = AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)


Optimizer = torch.optim.Optimizer | MuonWithAdamW


def build(model: LanguageModel, cfg: OptimizerConfig, finetune: FinetuneConfig | None = None) -> Optimizer:
    """The optimizer that `cfg` names, for the parameters that require a gradient. Each group has its highest learning
    rate in "peak_lr", for `set_lr`; with finetune.layer_decay it is lower the farther from the loss."""
    decay = 1.0 if finetune is None else finetune.layer_decay
    scale = lr_scales(model, decay).__getitem__
    module, _, attribute = cfg.built_by.partition(":")
    builder: Any = getattr(importlib.import_module(module), attribute)
    if isinstance(builder, type) and issubclass(builder, torch.optim.Optimizer):
        builder = partial(build_torch, builder)
    optimizer = builder(model, cfg, scale)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def parts(optimizer: Optimizer) -> dict[str, torch.optim.Optimizer]:
    """The torch optimizers that an optimizer consists of, by name."""
    if isinstance(optimizer, MuonWithAdamW):
        return optimizer.parts
    return {type(optimizer).__name__.lower(): optimizer}


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, as {"adamw.0.exp_avg": tensor}: part, number of the parameter in the order of its groups,
    name. Learning rates and the like are settings and not in it."""
    return flatten_state({name: part.state_dict() for name, part in parts(optimizer).items()})


def flatten_state(state_dicts: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The state in torch's state_dict of each part, under names as in `state_tensors`; what is no tensor as JSON."""
    return {
        f"{part}.{number}.{name}": value.detach().cpu().contiguous()
        if isinstance(value, Tensor)
        else torch.tensor([JSON, *json.dumps(value).encode()], dtype=torch.uint8)
        for part, state_dict in state_dicts.items()
        for number, state in state_dict["state"].items()
        for name, value in state.items()
    }


def restored(tensor: Tensor, parameter: Tensor) -> Any:
    """A value as it was before `flatten_state`: a tensor of any shape that comes of its parameter's dimensions, a copy,
    as it may be a view of a file; or what was in JSON. Raises ValueError for another shape."""
    if tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.numel() and tensor[0] == JSON:
        return json.loads(bytes(tensor[1:].tolist()))
    shape, own = tensor.shape, parameter.shape
    is_as_large = tensor.dim() > 0 and tensor.numel() == parameter.numel() and shape != own  # turned, for example
    if is_as_large or not set(shape) <= {1, *own}:
        raise ValueError(f"{list(shape)} for a weight {list(own)}")
    return tensor.clone()


def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores an optimizer's state from what `state_tensors` gave; its settings stay.

    Raises ValueError for tensors of another kind of optimizer or of other shapes.
    """
    states: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in parts(optimizer)}
    parameters = {
        part: [parameter for group in own.param_groups for parameter in group["params"]]
        for part, own in parts(optimizer).items()
    }
    for key, tensor in tensors.items():
        part, number, name = key.split(".", 2)
        try:
            states[part].setdefault(int(number), {})[name] = restored(tensor, parameters[part][int(number)])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    for part, own in parts(optimizer).items():
        own.load_state_dict({"state": states[part], "param_groups": own.state_dict()["param_groups"]})


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Sets the learning rate of each group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def in_steps(length: float, total_steps: int) -> int:
    """A length given as a fraction of the run (below 1) or in steps (from 1 on), in steps."""
    return round(length * total_steps) if length < 1 else int(length)


def check_schedule(cfg: ScheduleConfig, total_steps: int) -> None:
    """Raises UserError when warm-up or decay is longer than the run."""
    for key, length in (("warmup", cfg.warmup), ("decay", cfg.decay)):
        if in_steps(length, total_steps) > total_steps:
            raise UserError(f"schedule.{key}={length:g} is longer than the run of {count(total_steps, 'step')}")


def lr_factor(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0), as a fraction of the peak.

    Warm-up is linear and reaches 1 at its last step. Then, with x from 0 to 1 over the decaying part:
    cosine (Loshchilov and Hutter, 2017): final + (1 - final) (1 + cos(pi x)) / 2; linear: 1 - (1 - final) x;
    wsd (Hu et al., 2024): 1, then linear over the last `decay`; constant: 1.
    """
    warmup = in_steps(cfg.warmup, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    start = total_steps - in_steps(cfg.decay, total_steps) if cfg.name == "wsd" else warmup
    start = max(start, warmup)
    x = max(0.0, (step - start) / max(1, total_steps - start))
    return CURVES[cfg.name](x, cfg.final)


CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda x, final: 1.0,
    "cosine": lambda x, final: final + (1 - final) * (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x, final: 1 - (1 - final) * x,
    "wsd": lambda x, final: 1 - (1 - final) * x,
}
