"""Builds optimizers and their parameter groups, and computes the learning rate of each step."""

import importlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config.optimizers import AdamWConfig, MuonConfig, OptimizerConfig
from gpt.config.schema import FinetuneConfig, ScheduleConfig
from gpt.errors import UserError
from gpt.files.tensor_files import copy_rows
from gpt.files.tensor_shards import Parts, first_rows, is_sharded, joined, on_cpu, own_rows, parts_of, shape_of
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


class ShardedMuon(Muon):
    """Muon for matrices that are sharded: every rank has some rows of each.

    Momentum is a matter of rows, an update is not: it takes the whole matrix. So each rank gathers one of as many
    matrices as there are ranks, turns it into the update, and sends every rank its rows of that. Nobody computes what
    another does, or holds more than one matrix.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            n_ranks = matrices[0].device_mesh.size() if matrices else 1
            for start in range(0, len(matrices), n_ranks):
                self._step(matrices[start : start + n_ranks], group)

    def _step(self, matrices: list[Any], group: dict[str, Any]) -> None:
        """A step for at most one matrix of each rank: rank r computes the update of the one numbered r."""
        import torch.distributed as dist

        mesh, rows = matrices[0].device_mesh, []
        for matrix in matrices:
            gradient, state = matrix.grad, self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momentum = own_rows(state["momentum_buffer"]).lerp_(own_rows(gradient), 1 - group["momentum"])
            nesterov = group["nesterov"]
            rows.append(own_rows(gradient).lerp(momentum, group["momentum"]) if nesterov else momentum)
        # numbers that this rank has of each one's matrix, and that each has of this rank's
        here = [part.numel() for part in rows] + [0] * (mesh.size() - len(rows))
        there = [0] * mesh.size()
        own = matrices[mesh.get_local_rank()] if mesh.get_local_rank() < len(matrices) else None
        if own is not None:
            there = [own.shape[1] * (last - first) for first, last in pairwise(first_rows(own))]
        sent = torch.cat([part.flatten() for part in rows])
        gathered = sent.new_empty(sum(there))
        dist.all_to_all_single(gathered, sent, there, here, group=mesh.get_group())
        if own is not None:
            gathered = self._update(gathered.view(own.shape), group).flatten()
        dist.all_to_all_single(sent, gathered, here, there, group=mesh.get_group())
        for matrix, update in zip(matrices, sent.split(here[: len(rows)]), strict=True):
            own_rows(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(own_rows(matrix)))

    @staticmethod
    def _update(gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """What a step of Muon without momentum or decay adds to a matrix."""
        matrix = nn.Parameter(torch.zeros_like(gradient))
        matrix.grad = gradient
        alone = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        same = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        Muon([matrix], **{key: group[key] for key in same}, **alone).step()
        return matrix.detach()


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
            kind = ShardedMuon if any(map(is_sharded, inside)) else Muon
            self.parts["muon"] = kind(groups, momentum=cfg.momentum)
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


def state_tensors(optimizer: Optimizer, is_first: bool = True) -> dict[str, Tensor]:
    """An optimizer's state, as {"adamw.0.exp_avg": tensor}: part, number of the parameter in the order of its groups,
    name; `on_cpu`. Learning rates and the like are settings and not in it."""
    return on_cpu(flatten_state({name: part.state_dict() for name, part in parts(optimizer).items()}), is_first)


def flatten_state(state_dicts: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The state in torch's state_dict of each part, under names as in `state_tensors`; what is no tensor as JSON."""
    return {
        f"{part}.{number}.{name}": value
        if isinstance(value, Tensor)
        else torch.tensor([JSON, *json.dumps(value).encode()], dtype=torch.uint8)
        for part, state_dict in state_dicts.items()
        for number, state in state_dict["state"].items()
        for name, value in state.items()
    }


def restored(tensor: Tensor | Parts, parameter: Tensor) -> Any:
    """A value as it was before `flatten_state`: a tensor of any shape that comes of its parameter's dimensions, a copy,
    as it may be a view of a file, and sharded as its parameter; or what was in JSON. Raises ValueError for another
    shape."""
    first, shape, own = parts_of(tensor)[0], shape_of(tensor), list(parameter.shape)
    if first.dtype == torch.uint8 and first.dim() == 1 and first.numel() and first[0] == JSON:
        return json.loads(bytes(first[1:].tolist()))
    is_as_large = shape and math.prod(shape) == parameter.numel() and shape != own  # turned, for example
    if is_as_large or not set(shape) <= {1, *own}:
        raise ValueError(f"{shape} for a weight {own}")
    if not is_sharded(parameter) or not shape:
        return first.clone() if len(parts_of(tensor)) == 1 else joined(tensor)
    if shape != own:
        raise ValueError(f"{shape} for a sharded weight {own}")
    rows = torch.empty_like(parameter.detach(), dtype=first.dtype)
    copy_rows(parts_of(tensor), rows)
    return rows


def load_state_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor | Parts]) -> None:
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
