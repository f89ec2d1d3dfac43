"""Writes and reads adapters without the model that they are for, in the two files of the peft library (0.4 and later).

In peft's names a model is that of transformers: our h.0.attn.c_attn.lora_a, (rank, in), of a GPT-2 is there
base_model.model.transformer.h.0.attn.c_attn.lora_A.weight, of the same shape; that of a Llama or Qwen3 begins with
base_model.model.model.layers.0.
"""

import json
import logging
import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from gpt import lora
from gpt.config.families import GPT2Config, ModernConfig
from gpt.config.fields import first_error
from gpt.config.schema import LoRAConfig
from gpt.config.value_errors import as_typed
from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError, unusable
from gpt.files import atomic, hub_names
from gpt.files.json_file import read_object
from gpt.files.paths import PROJECT_ROOT, absolute
from gpt.files.tensor_files import read_safetensors
from gpt.files.tensor_shards import is_sharded, joined
from gpt.model import LanguageModel
from gpt.runs.checkpoint import read_parts
from gpt.runs.manifest import read_manifest

log = logging.getLogger(__name__)

PREFIXES = {"gpt2": "transformer", "modern": "model"}  # of the families that transformers has
LINEAR = (*GPT2Config.linear_layers, *ModernConfig.linear_layers)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(
    r"base_model\.model\.(?:transformer\.|model\.)?"
    rf"((?:h|layers)\.\d+\.({'|'.join(map(re.escape, LINEAR))}))\.lora_([AB])\.weight"
)
# Settings of peft's that say how an adapter was made, or what its tensors show as well.
HISTORY = {
    "auto_mapping", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Ways to draw the first A and B. The others (pissa, olora, ...) change the weights of the model as well.
DRAWN = {None, True, False, "gaussian", "eva", "orthogonal"}
LARGEST_CONFIG = 2**20  # bytes


@dataclass(frozen=True)
class Adapter:
    """What is in peft's two files."""

    lora: LoRAConfig
    tensors: dict[str, Tensor]  # under our names, in float32
    base: str | None  # the model that it is for, as whoever trained it called that


def save(
    directory: Path, model: LanguageModel, cfg: LoRAConfig, base: str | None, revision: str | None = None,
    checkpoint: Path | None = None,
) -> None:  # fmt: skip
    """Writes the adapters of a model; `base` is the model that they are for, `revision` its commit on the hub. Those of
    a model that is sharded are taken from its checkpoint. Raises UserError (5)."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": cfg.rank,
        "lora_alpha": int(cfg.alpha) if cfg.alpha.is_integer() else cfg.alpha,
        "target_modules": list(cfg.targets),  # peft takes all modules whose names end so
        "fan_in_fan_out": model.config.family == "gpt2",  # which transformers keeps its matrices of as (in, out)
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    adapters = lora.adapters(model)
    if any(map(is_sharded, adapters.values())):
        parts = read_parts(checkpoint, read_manifest(checkpoint).weights)
        adapters = {name: joined(parts[name]) for name in adapters}
    for name, tensor in adapters.items():
        layer, _, letter = name.rpartition(".lora_")
        tensors[f"base_model.model.{PREFIXES[model.config.family]}.{layer}.lora_{letter.upper()}.weight"] = (
            tensor.cpu().contiguous()
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(directory / WEIGHTS) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        atomic.write(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"adapter not written: {error.strerror or error}", str(directory), code=ENVIRONMENT) from error


def can_load(base: str) -> bool:
    """Whether peft finds the model called `base`: on the hub, or in a directory as transformers writes it."""
    config = absolute(base) / "config.json"  # a checkpoint of this project has one too
    return hub_names.is_repository(base, PROJECT_ROOT) or (
        config.is_file() and not config.with_name("manifest.json").exists()
    )


def say_how(directory: Path, base: str) -> None:
    """Says, also in the README.md beside the adapter, how peft gets a model that only this project reads. Raises
    UserError (5)."""
    model = directory.with_name("base")
    export = shlex.join(["python", str(PROJECT_ROOT / "generate.py"), f"checkpoint={base}", f"export={model}"])
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(model)!r}), {str(directory)!r})"
    text = f"This adapter is for {base}, which peft does not read. Export that:\n\n    {export}\n\n"
    text += f"and load both:\n\n    {load}\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write(directory / "README.md", text)
    except OSError as error:
        raise UserError(f"adapter not written: {error.strerror or error}", str(directory), code=ENVIRONMENT) from error
    log.info(f"adapter: peft does not read {base}; {directory / 'README.md'} says how it gets that model")


def read(directory: Path) -> Adapter:
    """Raises UserError (3) for files that are damaged, and for kinds of adapters that gpt/lora.py does not have."""
    path = directory / WEIGHTS
    config = read_config(directory / CONFIG)
    if not path.is_file():
        raise unusable(directory, f"{WEIGHTS}: missing")
    tensors, targets, others = {}, set(), []
    for name, tensor in sorted(read_safetensors(path).items()):
        if match := NAME.fullmatch(name):
            layer, target, letter = match.groups()
            tensors[f"{layer}.lora_{letter.lower()}"] = tensor.to(torch.float32)
            targets.add(target)
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise unsupported(
            path, f"not an adapter of a linear layer of GPT-2, Llama or Qwen3: {', '.join(others[:3])[:300]}{more}"
        )
    if not tensors:
        raise unusable(path, "no adapter in it")
    try:
        ordered = [target for target in LINEAR if target in targets]
        cfg = LoRAConfig(rank=config["r"], alpha=config["lora_alpha"], targets=ordered)
        if config.get("use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, 2023)
            cfg = replace(cfg, alpha=cfg.alpha * math.sqrt(cfg.rank))
        base = TypeAdapter(str | None).validate_python(config.get("base_model_name_or_path"))
    except KeyError as error:
        raise unusable(directory / CONFIG, f"{error} missing") from error
    except ValidationError as error:
        raise unusable(directory / CONFIG, first_error(error)) from error
    for name, tensor in tensors.items():  # before anything of that size is made
        if tensor.dim() != 2 or tensor.shape[name.endswith("b")] != cfg.rank:
            raise unusable(path, f"tensor {name}: {list(tensor.shape)} in the file, r is {cfg.rank} in {CONFIG}")
    return Adapter(cfg, tensors, base)


def read_config(path: Path) -> dict[str, Any]:
    """peft's settings, after everything that would make its model compute something else has been refused."""
    if not path.is_file():  # also a pipe, which would be waited for
        raise unusable(path.parent, f"{path.name}: missing")
    try:
        config = read_object(path, LARGEST_CONFIG)
    except (OSError, ValueError) as error:
        raise unusable(path, f"not peft's settings: {' '.join(str(error).split())[:200]}") from error
    if config.get("peft_type") != "LORA":
        raise unsupported(path, f"peft_type {in_json(config.get('peft_type'))}, not LORA")
    drawn = config.get("init_lora_weights")
    if not isinstance(drawn, (str, bool, type(None))) or drawn not in DRAWN:
        raise unsupported(path, f"init_lora_weights {in_json(drawn)}, with which the weights of the model change too")
    read_here = {"peft_type", "init_lora_weights", "r", "lora_alpha", "use_rslora", "base_model_name_or_path"}
    for key, value in config.items():
        if value and (key, value) != ("bias", "none") and key not in HISTORY | read_here:
            raise unsupported(path, f"{as_typed(key)} {in_json(value)}")
    return config


def unsupported(path: Path, what: str) -> UserError:
    """The error for an adapter that says something else than gpt/lora.py computes."""
    remedy = "merge it into its model with peft (merge_and_unload, save_pretrained) and load that"
    return UserError(f"{path.name}: an adapter of another kind: {what}", str(path.parent), remedy, CHECKPOINT)


def in_json(value: Any) -> str:
    """A value of peft's settings as its file has it, cut when it is long."""
    return as_typed(value if isinstance(value, str) else json.dumps(value))
