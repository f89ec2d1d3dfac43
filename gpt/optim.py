"""Builds optimizers and their parameter groups, and computes the learning rate and the window of each step."""

import importlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config.optimizers import AdamWConfig, MuonConfig, OptimizerConfig, SOAPConfig
from gpt.config.schedules import ScheduleConfig
from gpt.config.schema import FinetuneConfig
from gpt.errors import ENVIRONMENT, UserError
from gpt.files.tensor_files import copy_rows
from gpt.files.tensor_shards import Parts, is_sharded, joined, on_cpu, parts_of, shape_of
from gpt.finetune import kinds, lr_scales
from gpt.model import LanguageModel
from gpt.optimizers import centred, muon, running_mean
from gpt.terminal.console import count

Groups = list[dict[str, Any]]
Scale = Callable[[str], float]  # of the learning rate, by the name of the weight
COUNTS = ("step",)  # what an optimizer may count for a whole group, as pytorch-optimizer's do; else groups are settings
JSON = 0  # the first byte of a state that is no tensor, in a checkpoint; no JSON begins with it


def without_compiler_hooks(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without torch's wrappers around its methods. They only tell torch.compile not to trace inside,
    and import it for that, which takes 0.9 s of each start (experiments/speed); here no optimizer is compiled."""
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


AdamW = without_compiler_hooks(torch.optim.AdamW)
Muon, ShardedMuon, RunningMean, Centred = map(
    without_compiler_hooks, (muon.Muon, muon.ShardedMuon, running_mean.RunningMean, centred.Centred)
)


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    """Two groups: matrices and embeddings, which are decayed, and biases and norms, which are not."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def scaled_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, scale: Scale,
    own_lrs: Mapping[str, float | None] = MappingProxyType({}),
) -> Groups:  # fmt: skip
    """The `decay_groups` of each learning rate: `lr`, or that of `own_lrs` by the weight's name, times the scale of the
    name. Those of `lr` come first, and of these the largest rate: the one that is logged."""
    named = defaultdict(list)
    for name, parameter in parameters:
        own = own_lrs.get(name)
        named[own is None, scale(name), lr if own is None else own].append((name, parameter))
    return [
        group | {"lr": s * base}
        for is_common, s, base in sorted(named, reverse=True)
        for group in decay_groups(named[is_common, s, base], weight_decay)
    ]


def own_lrs(model: LanguageModel, cfg: AdamWConfig | MuonConfig | SOAPConfig) -> dict[str, float | None]:
    """The learning rate of each weight whose kind has one of its own, by name; None for all others."""
    by_kind = {"embedding": cfg.embedding_lr, "head": cfg.head_lr, "scalar": cfg.scalar_lr, "matrix": None}
    return {name: by_kind[kind] for name, kind in kinds(model).items()}


def build_adamw(model: LanguageModel, cfg: AdamWConfig, scale: Scale) -> torch.optim.Optimizer:
    groups = scaled_groups(model.named_parameters(), cfg.lr, cfg.weight_decay, scale, own_lrs(model, cfg))
    return AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def build_torch(
    kind: type[torch.optim.Optimizer], model: LanguageModel, cfg: Any, scale: Scale
) -> torch.optim.Optimizer:
    """An optimizer that takes its settings by the names that they have in its dataclass."""
    settings = {key: value for key, value in vars(cfg).items() if key != "name"}
    groups = scaled_groups(model.named_parameters(), cfg.lr, settings.pop("weight_decay", 0.0), scale)  # Rprop has none
    return without_compiler_hooks(kind)(groups, **settings)


class Combined:
    """Optimizers that have their own parameters each, or watch those of the others, under the interface of one."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)


Optimizer = torch.optim.Optimizer | Combined


def build_muon(model: LanguageModel, cfg: MuonConfig, scale: Scale) -> Combined:
    keys = ("momentum", "nesterov", "scale", "orthogonalization", "cautious_decay", "momentum_warmup", "second_moment")
    kind = Muon
    if any(map(is_sharded, model.parameters())):
        for key, off in (("second_moment", None), ("centred_head", False)):
            if getattr(cfg, key) != off:
                what = f"optimizer.{key} is of whole matrices, which parallel=fsdp shards"
                raise UserError(what, remedy=f"set it to {'null' if off is None else 'false'}, or parallel=ddp")
        kind = ShardedMuon
    both = beside_adamw("muon", partial(kind, **{key: getattr(cfg, key) for key in keys}), model, cfg, scale)
    if cfg.centred_head and model.head.requires_grad:
        return Combined(both.parts | {"centred": Centred(model.head)})
    return both


def build_soap(model: LanguageModel, cfg: SOAPConfig, scale: Scale) -> Combined:
    """SOAP for matrices, AdamW for the rest. The first step of SOAP measures gradients and moves no matrix."""
    try:
        from gpt.optimizers.soap import SOAP
    except ImportError:
        remedy = "pip install -r requirements.txt -r requirements-soap.txt"
        raise UserError("pytorch-optimizer is not installed", "optimizer=soap", remedy, ENVIRONMENT) from None
    if any(map(is_sharded, model.parameters())):
        raise UserError("optimizer=soap takes whole matrices, which parallel=fsdp shards", remedy="set parallel=ddp")
    settings = {"betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "precondition_frequency": cfg.precondition_every}
    return beside_adamw("soap", partial(without_compiler_hooks(SOAP), **settings), model, cfg, scale)


def beside_adamw(
    name: str, kind: Callable[..., torch.optim.Optimizer], model: LanguageModel, cfg: MuonConfig | SOAPConfig,
    scale: Scale,
) -> Combined:  # fmt: skip
    """An optimizer for the matrices inside the blocks, and AdamW for everything else. When one of them would have no
    parameters, only the other exists."""
    inside = {p for p in model.blocks.parameters() if p.dim() == 2}
    matrices = [(name, p) for name, p in model.named_parameters() if p in inside]
    others = [(name, p) for name, p in model.named_parameters() if p not in inside]
    parts = {}
    if groups := scaled_groups(matrices, cfg.lr, cfg.weight_decay, scale):
        parts[name] = kind(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)
    if groups := scaled_groups(others, cfg.adamw_lr, cfg.weight_decay, scale, own_lrs(model, cfg)):
        parts["adamw"] = AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    return Combined(parts)


def build(
    model: LanguageModel, cfg: OptimizerConfig, finetune: FinetuneConfig | None = None, ema: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Optimizer:  # fmt: skip
    """The optimizer that `cfg` names, for the parameters that require a gradient, and with `ema` a mean of these that
    forgets as slowly. `dtype`: of the run's products, which Muon's are among (bfloat16 for float16, whose range is too
    small). Each group has its highest learning rate in "peak_lr", for `set_lr`; with finetune.layer_decay it is lower
    the farther from the loss. "names" are those of its parameters."""
    decay = 1.0 if finetune is None else finetune.layer_decay
    scale = lr_scales(model, decay).__getitem__
    module, _, attribute = cfg.built_by.partition(":")
    builder: Any = getattr(importlib.import_module(module), attribute)
    if isinstance(builder, type) and issubclass(builder, torch.optim.Optimizer):
        builder = partial(build_torch, builder)
    optimizer = builder(model, cfg, scale)
    if ema is not None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = Combined(parts(optimizer) | {"ema": RunningMean(trained, ema)})
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["peak_lr"], group["names"] = group["lr"], [names[parameter] for parameter in group["params"]]
        if "dtype" in group:
            group["dtype"] = torch.bfloat16 if dtype == torch.float16 else dtype
    return optimizer


def parts(optimizer: Optimizer) -> dict[str, torch.optim.Optimizer]:
    """The torch optimizers that an optimizer consists of, by name."""
    if isinstance(optimizer, Combined):
        return optimizer.parts
    return {type(optimizer).__name__.lower(): optimizer}


def state_tensors(optimizer: Optimizer, is_first: bool = True) -> dict[str, Tensor]:
    """An optimizer's state, as {"adamw.norm.weight.exp_avg": tensor}: part, name of the parameter, name; `on_cpu`.
    Learning rates and the like are settings and not in it: with others, parameters are in other groups."""
    state_dicts = {name: part.state_dict() for name, part in parts(optimizer).items()}
    return on_cpu(flatten_state(state_dicts, weights_of_parts(optimizer)), is_first)


def weights_of_parts(optimizer: Optimizer) -> dict[str, list[str]]:
    """The names of the parameters of each part, in the order of its groups, by which torch numbers them."""
    return {
        part: [name for group in own.param_groups for name in group["names"]] for part, own in parts(optimizer).items()
    }


def flatten_state(
    state_dicts: dict[str, dict[str, Any]], weights: dict[str, list[str]] | None = None
) -> dict[str, Tensor]:
    """The state in torch's state_dict of each part, under names as in `state_tensors`, or with the numbers of the
    parameters for their names; what is no tensor as JSON. Of a list of tensors each has its place as a further name; a
    count that a group keeps has the group's number after a g."""
    flat = {}
    for part, state_dict in state_dicts.items():
        for number, state in state_dict["state"].items():
            weight = weights[part][number] if weights else number
            for name, value in state.items():
                is_list = isinstance(value, list) and any(isinstance(item, Tensor) for item in value)
                items = {f"{name}.{i}": item for i, item in enumerate(value)} if is_list else {name: value}
                flat |= {f"{part}.{weight}.{key}": item for key, item in items.items()}
        for number, group in enumerate(state_dict["param_groups"]):
            flat |= {f"{part}.g{number}.{name}": group[name] for name in COUNTS if name in group}
    return {
        key: value
        if isinstance(value, Tensor)
        else torch.tensor([JSON, *json.dumps(value).encode()], dtype=torch.uint8)
        for key, value in flat.items()
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
    """Restores an optimizer's state from what `state_tensors` gave, or what it gave when it still numbered parameters;
    its settings stay.

    Raises ValueError for tensors of another kind of optimizer, of other parameters or of other shapes.
    """
    states: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in parts(optimizer)}
    parameters = {
        part: [parameter for group in own.param_groups for parameter in group["params"]]
        for part, own in parts(optimizer).items()
    }
    groups = {part: own.state_dict()["param_groups"] for part, own in parts(optimizer).items()}
    numbers = {
        part: {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
        for part, names in weights_of_parts(optimizer).items()
    }
    for key, tensor in sorted(tensors.items()):  # the places of a list in their order
        part, *words = key.split(".")
        if part == "ema" and part not in states:
            continue  # a mean that the run no longer keeps
        if part not in states:
            raise ValueError(f"{key}: of {part}, not of {' and '.join(states)}")
        try:
            length = next((i for i in range(1, len(words)) if ".".join(words[:i]) in numbers[part]), 0)
            if not length and words[0].startswith("g") and words[1:] in [[name] for name in COUNTS]:
                for group in groups[part]:  # all of them have counted the same steps
                    group[words[1]] = restored(tensor, parameters[part][0])
                continue
            if not length:
                raise ValueError("this optimizer trains no such weight")
            number, (name, *place) = numbers[part][".".join(words[:length])], words[length:]
            value = restored(tensor, parameters[part][number])
            state = states[part].setdefault(number, {})
            state[name] = [*state.get(name, []), value] if place else value
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    for part, own in parts(optimizer).items():
        own.load_state_dict({"state": states[part], "param_groups": groups[part]})


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Sets the learning rate of each group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def in_steps(length: float, total_steps: int) -> int:
    """A length given as a fraction of the run (below 1) or in steps (from 1 on), in steps."""
    return round(length * total_steps) if length < 1 else int(length)


def check_schedule(cfg: ScheduleConfig, total_steps: int) -> None:
    """Raises UserError when a warm-up or the decay is longer than the run."""
    for key, length in (("warmup", cfg.warmup), ("decay", cfg.decay), ("window_warmup", cfg.window_warmup)):
        if length is not None and in_steps(length, total_steps) > total_steps:
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


def training_window(cfg: ScheduleConfig, window: int | None, step: int, total_steps: int) -> int | None:
    """The tokens that a windowed layer of a model with such a `window` sees in step `step` (from 0).

    During schedule.window_warmup they are the multiples of schedule.window_start below the window, one after the other
    for the same number of steps, and the window from then on. After modded-nanogpt, whose window grows in blocks.
    """
    if window is None or cfg.window_warmup is None:
        return window
    n_smaller = math.ceil(window / cfg.window_start) - 1
    warmup = in_steps(cfg.window_warmup, total_steps)
    return window if step >= warmup else cfg.window_start * (1 + step * n_smaller // warmup)


CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda x, final: 1.0,
    "cosine": lambda x, final: final + (1 - final) * (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x, final: 1 - (1 - final) * x,
    "wsd": lambda x, final: 1 - (1 - final) * x,
}
