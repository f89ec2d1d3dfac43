"""Writes a model in int8 or int4 as a directory of its own format, and reads it back.

config.json, whose model_type no other program knows, says what the model is; quantized.safetensors has the codes as
gpt/generation/packed_linear.py defines them, in plain order, with scales, biases, norms and embeddings; SHA256SUMS has
their sums. What a processor's kernels want is made of them at load, and never saved.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from gpt import tokenizer
from gpt.config.fields import first_error
from gpt.errors import UserError, unusable
from gpt.files.json_file import read_object
from gpt.files.tensor_files import read_safetensors
from gpt.generation import precision
from gpt.generation.packed_linear import GROUP, PackedLinear
from gpt.model import LanguageModel
from gpt.runs import model_card
from gpt.runs.manifest import Identity
from gpt.runs.model_file import Loaded
from gpt.weights import export, hub_card, loading, weight_files
from gpt.weights.source import of_model
from gpt.weights.weight_files import SUMS, Weights

MODEL_TYPE = "gpt_lab_quantized"
FORMAT = 1
CONFIG, WEIGHTS = "config.json", "quantized.safetensors"
QUANTIZED = ("int8", "int4")
Shapes = dict[str, tuple[torch.dtype, list[int]]]

README = """# A model in {precision}

{notice}
Weights in a format of gpt-lab, {bits}. Only gpt-lab reads it: `python generate.py checkpoint=<this folder>`.
Transformers and llama.cpp have formats of their own: export the model without `precision` for them.
"""
BITS = {"int8": "8 bits for each and a scale for each row", "int4": f"4 bits for each, and 32 more for {GROUP} of them"}


@dataclass(frozen=True)
class About:
    """What config.json says besides the format."""

    identity: Identity
    step: Annotated[int, Field(strict=True, ge=0)]


def write(loaded: Loaded, name: str, directory: Path) -> None:
    """Writes a model that is in float32 in the precision `name`, into a directory that appears whole or not at all;
    the model is changed. Raises UserError: (2) for another precision or when something is in the way, (5) when the disk
    refuses."""
    export.check_place(directory)
    if name not in QUANTIZED:
        raise UserError(f"export in precision={name}", remedy=f"use {' or '.join(QUANTIZED)}, or leave it out")
    export.check_bits(loaded)
    model, tokens = precision.prepare(loaded.model, name), tokenizer.load(loaded.tokenizer_name)
    identity = Identity(model.config, model.vocab_size, loaded.tokenizer_name, loaded.template)
    about = {"model_type": MODEL_TYPE, "format": FORMAT, "precision": name, "group": GROUP, "step": loaded.step}
    notice = model_card.notice(hub_card.find_record(loaded.path).settings)
    texts = {
        "README.md": README.format(precision=name, bits=BITS[name], notice=notice).encode(),
        CONFIG: export.in_json(about | {"identity": identity.as_dict()}),
        **tokens.files,
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in saved(model).items()}
    export.publish(directory, texts, WEIGHTS, tensors, {"format": MODEL_TYPE})


def saved(model: LanguageModel) -> dict[str, Tensor]:
    """All tensors of a packed model; an untied head is in its packed form only."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def is_quantized(path: Path) -> bool:
    """Whether a directory, or the file of a model's weights or settings in it, is of this format. Whatever is damaged
    may be of another."""
    try:
        folder = path.parent if path.name in (CONFIG, WEIGHTS) and path.is_file() else path
        return read_object(folder / CONFIG).get("model_type") == MODEL_TYPE
    except (OSError, ValueError):
        return False


def read(directory: Path, device: torch.device) -> tuple[Loaded, str]:
    """The model in a directory and its precision. Raises UserError: (3) for what is damaged, (2) for a precision that
    the device has no operators for."""
    directory = directory if directory.is_dir() else directory.parent
    path = directory / WEIGHTS
    for name in (SUMS, CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise unusable(directory, f"{name}: missing")
    sums = weight_files.sums_in(directory)
    for name in (CONFIG, WEIGHTS):
        if name not in sums:
            raise unusable(directory / SUMS, f"nothing about {name}")
        weight_files.verify(directory / name)
    name, identity, step = described(directory / CONFIG)
    precision.check(name, device, "the model that it was made of")
    n_vocab = tokenizer.carried(identity.tokenizer, directory).n_vocab
    if n_vocab != identity.vocab_size:
        reason = f"vocabulary {identity.vocab_size}, its tokenizer {identity.tokenizer} has {n_vocab}"
        raise unusable(directory / CONFIG, reason)
    tensors = read_safetensors(path)
    architecture = of_model(identity.model, identity.vocab_size, identity.tokenizer)
    parts = {key: (tensor,) for key, tensor in tensors.items()}
    weights = Weights(directory, [path], f"a model in {name}", architecture, parts, identity, step)
    model = loading.empty(identity.model, identity.vocab_size, weights).to(device)
    check_shapes(tensors, shapes_of(model, name), path)
    fill(model, name, {key: tensor.to(device) for key, tensor in tensors.items()})
    about = identity.tokenizer, identity.template, step, directory, (path,)
    return Loaded(precision.ready(model.eval(), name), *about), name


def described(path: Path) -> tuple[str, Identity, int]:
    """Precision, identity and step by config.json. Raises UserError (3)."""
    content: dict[str, Any] = read_object(path)
    written = content.get("format"), content.get("group"), content.get("precision")
    if written[:2] != (FORMAT, GROUP) or written[2] not in QUANTIZED:
        own = f"format {FORMAT}, group {GROUP}, {' or '.join(QUANTIZED)}"
        raise unusable(path, f"format {written[0]}, group {written[1]}, {written[2]}; this version reads {own}")
    try:
        about = TypeAdapter(About).validate_python({key: content.get(key) for key in ("identity", "step")})
    except ValidationError as error:
        raise unusable(path, first_error(error)) from error
    return written[2], about.identity, about.step


def linear_layers(model: LanguageModel) -> dict[str, nn.Linear]:
    """The layers of a model that is not packed yet which become packed ones, by name, but for the head."""
    inside = {module for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in model.named_modules() if module in inside}


def shapes_of(model: LanguageModel, name: str) -> Shapes:
    """Type and shape of every tensor in the file of such a model in the precision `name`."""
    layer, wanted = precision.LAYERS[name], {}
    tables = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, nn.Embedding)}
    layers = linear_layers(model)
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in layers and key != "lm_head.weight":
            wanted[key] = (torch.bfloat16 if key in tables else tensor.dtype, list(tensor.shape))
    for key, linear in layers.items():
        own = layer.shapes(linear.out_features, linear.in_features)
        own |= {} if linear.bias is None else {"bias": (torch.bfloat16, [linear.out_features])}
        wanted |= {f"{key}.{part}": value for part, value in own.items()}
    head = layer.shapes(model.vocab_size, model.config.n_embd)
    return wanted | {f"packed_head.{part}": value for part, value in head.items()}


def check_shapes(tensors: dict[str, Tensor], wanted: Shapes, path: Path) -> None:
    """Raises UserError (3) naming the first tensor that differs, or is not finite."""
    for key in sorted(wanted.keys() | tensors.keys()):
        tensor = tensors.get(key)
        found = None if tensor is None else (tensor.dtype, list(tensor.shape))
        if found != wanted.get(key):
            raise unusable(path, f"tensor {key[:80]!r}: {found} in the file, {wanted.get(key)} in the model")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise unusable(path, f"tensor {key} is not finite")


@torch.no_grad()
def fill(model: LanguageModel, name: str, tensors: dict[str, Tensor]) -> None:
    """Gives a model without weights its layers, its head, and all else."""
    layers = linear_layers(model)
    for key, linear in layers.items():
        parent, _, last = key.rpartition(".")
        setattr(model.get_submodule(parent), last, packed(name, tensors, key, linear.in_features))
    model.packed_head = packed(name, tensors, "packed_head", model.config.n_embd)
    precision.replace(model, nn.Embedding, precision.table)
    if not model.config.tie_weights:
        precision.without_head(model)
    for key, target in saved(model).items():
        if key.rpartition(".")[0] not in {*layers, "packed_head"}:
            target.copy_(tensors[key])


def packed(name: str, tensors: dict[str, Tensor], key: str, in_features: int) -> PackedLinear:
    layer = precision.LAYERS[name]
    own = {part: tensors[f"{key}.{part}"] for part in layer.shapes(1, 1)}
    return layer(in_features, tensors.get(f"{key}.bias"), **own)
