"""Gives a model its first weights: random ones, or those of a file that fit it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gpt import lora, tokenizer
from gpt.config.families import GPT2Config, ModelConfig, model_class
from gpt.config.schema import InitConfig
from gpt.errors import CHECKPOINT, UserError, one_line, unusable
from gpt.files.tensor_files import copy
from gpt.files.tensor_shards import Parts, cut, shape_of
from gpt.machine.sizes import NotDrawn
from gpt.model import LanguageModel
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import Loaded
from gpt.terminal.console import count, escape
from gpt.weights import adapters, locate, tensor_names
from gpt.weights.weight_files import Adapters, Weights, same

log = logging.getLogger(__name__)

GPT2_WIDTHS = (768, 1024, 1280, 1600)  # of GPT-2 small to xl, whose heads are known to be 64 wide
PADDING = 1024  # rows that an embedding may have beyond the vocabulary, at most: some pad it to a round number


@dataclass(frozen=True)
class First:
    """The first weights of a model that has none yet: all of them, in its shapes; and what is recorded of them."""

    model: LanguageModel
    tensors: dict[str, Parts]
    path: Path
    origin: dict[str, Any]
    adapters: Adapters


def find(cfg: InitConfig, model: ModelConfig, tokenizer_name: str, root: Path) -> First | None:
    """The weights that `cfg` names, for a model with this tokenizer; None for random ones. They are compared
    with the model, but not copied yet. Raises UserError naming what does not fit."""
    if cfg.from_ is None:
        return None
    source = locate.find(cfg.from_, cfg.revision, root)
    weights = adapters.read(source, root)
    locate.check_tokenizer(source, tokenizer_name)
    log.info(f"weights from {weights.path}: {weights.about}")
    check_family(weights, model)
    origin = {"from": cfg.from_, "about": weights.about, "revision": source.revision, "sha256": weights.hashes()}
    return First(*fit(weights, model, tokenizer.load(tokenizer_name).n_vocab), weights.path, origin, weights.adapters)


def load(name: str, root: Path, device: torch.device, given: Mapping[str, Any] = MappingProxyType({})) -> Loaded:
    """The model that is called `name`, in evaluation mode, whatever its format. `given`: settings that its file may not
    say, such as n_head; None for those that are not known. Raises UserError."""
    source = locate.find(name, None, root)
    weights = adapters.read(source, root)
    if source.kind == "adapter" or (source.kind == "file" and weights.identity is None):  # what they are is inferred
        log.info(f"weights from {weights.path}: {weights.about}")
    identity = weights.identity or identity_of(weights, name, locate.own_tokenizer(source))
    known = {key: value for key, value in given.items() if value is not None}
    unknown = known.keys() - vars(identity.model).keys()
    if unknown:
        raise UserError(f"a model of the family {identity.model.family} has no {', '.join(unknown)}", str(weights.path))
    identity = replace(identity, model=replace(identity.model, **known))
    locate.check_tokenizer(source, identity.tokenizer)
    n_vocab = tokenizer.load(identity.tokenizer).n_vocab
    if n_vocab != identity.vocab_size:
        raise unusable(
            weights.path, f"vocabulary {identity.vocab_size}, its tokenizer {identity.tokenizer} has {n_vocab}"
        )
    fitting = fit(weights, identity.model, n_vocab, f"leave out model.{' and model.'.join(known)}: the file says it")
    model = filled(First(*fitting, weights.path, {}, weights.adapters))
    about = identity.tokenizer, identity.template, weights.step, weights.path, tuple(weights.files)
    return Loaded(model.to(device).eval(), *about)


def identity_of(weights: Weights, name: str, own: str) -> Identity:
    """Weights from elsewhere have the tokenizer `own`; where that is GPT-2's, it is that of bytes if there are as many
    tokens as these."""
    a = weights.architecture
    is_of_bytes = own == "gpt2" and a.vocab_size == tokenizer.load("bytes").n_vocab
    tokens = tokenizer.load("bytes" if is_of_bytes else own)
    shape = (a.n_layer, a.n_head, a.n_embd, a.context_length)
    model_name = Path(name).name or weights.path.resolve().name or "model"  # checkpoint=. has no name
    model = GPT2Config("gpt2", model_name, *shape, 0.0, a.tie_weights, a.gelu or "tanh")
    if a.model:
        model = replace(a.model, name=model_name)
    return Identity(model, tokens.n_vocab, tokens.name, None)


def check_family(weights: Weights, model: ModelConfig) -> None:
    """Raises UserError (3) for weights of another family than that of the model."""
    family = weights.architecture.family
    if family != model.family:
        what = f"family {family} in the file, {model.family} in model.family"
        raise UserError(what, str(weights.path), pretrained(family), CHECKPOINT)


def pretrained(family: str) -> str:
    """What to do about weights that do not fit the settings."""
    return (
        f"model={locate.PRETRAINED[family]} takes the architecture from the file" if family in locate.PRETRAINED else ""
    )


def build(cfg: ModelConfig, n_vocab: int, first: First | None) -> LanguageModel:
    """A model with random weights, or with those that were found."""
    return model_class(cfg.family)(cfg, n_vocab) if first is None else filled(first)


def filled(first: First) -> LanguageModel:
    """The model with its weights, copied piece by piece: hardly anything is in memory twice. Raises UserError (3) for
    numbers that are not finite."""
    for name, target in first.model.state_dict().items():
        start = 0
        for part in first.tensors[name]:
            copy(part, target[start : start + len(part)])
            start += len(part)
        if name in first.adapters:
            target.copy_(lora.merged_weight(target, *first.adapters[name]))
        if not torch.isfinite(target.sum()):
            raise unusable(first.path, f"tensor {name} is not finite")
    return first.model


def empty(cfg: ModelConfig, n_vocab: int, weights: Weights) -> LanguageModel:
    """A model without weights. Raises UserError (3) for one that cannot be."""
    if cfg.n_layer > len(weights.tensors):  # which would take long even so
        raise unusable(weights.path, f"{len(weights.tensors)} tensors, and {cfg.n_layer} layers")
    try:
        with NotDrawn():
            return model_class(cfg.family)(cfg, n_vocab)
    except (ValueError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        what = f"not a model that can be: {one_line(error)}"
        raise UserError(what, str(weights.path), code=CHECKPOINT) from error


def fit(
    weights: Weights, cfg: ModelConfig, n_vocab: int, remedy: str | None = None
) -> tuple[LanguageModel, dict[str, Parts]]:  # fmt: skip
    """A model without weights, and the tensors that it takes of those that were found.

    The context may be shorter than that of the file, and the padding of an embedding is left out. Raises UserError (3),
    or (2) for a context that is longer."""
    path, shape, tensors = weights.path, weights.architecture, dict(weights.tensors)
    remedy = remedy or pretrained(shape.family)
    model = empty(cfg, n_vocab, weights)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not n_vocab <= shape.vocab_size < n_vocab + PADDING:
        what = f"a vocabulary of {shape.vocab_size:,} tokens in the file, {n_vocab:,} in the tokenizer"
        raise UserError(what, str(path), "only models with the tokenizer's vocabulary can be used", CHECKPOINT)
    if cfg.context_length > shape.context_length and cfg.n_embd == shape.n_embd:  # else it is another model
        what = f"model.context_length {cfg.context_length} is longer than the {shape.context_length} of the weights"
        raise UserError(what, str(path), f"set model.context_length={shape.context_length}, or less")
    if shape.vocab_size > n_vocab:
        log.info(f"{shape.vocab_size - n_vocab} rows of the embedding are beyond the vocabulary, and left out")
    embeddings = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    for name in {*embeddings, "lm_head.weight"} & tensors.keys():
        tensors[name] = cut(tensors[name], wanted[name][0] if name in wanted else n_vocab)
    without = tensor_names.missing_biases(tensors, list(wanted))
    if without:
        log.info(f"{len(without)} biases that the weights do not have are 0 at first")
    tensors |= {name: (torch.zeros(wanted[name]),) for name in without}
    head, embedding = tensors.get("lm_head.weight"), tensors.get(embeddings[0])
    if cfg.tie_weights and head and embedding and same(head, embedding):
        del tensors["lm_head.weight"]
    elif not cfg.tie_weights and not head and embedding:
        log.info("the weights have no head of their own: it begins as a copy of the embedding")
        tensors["lm_head.weight"] = embedding
    stated_by = weights.identity.model if weights.identity else shape.model or shape
    differs = any(getattr(cfg, key, None) != getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "gelu"))
    differs = differs or any(getattr(cfg, key, None) != getattr(stated_by, key) for key in shape.stated)
    remedy = remedy if differs else ""
    check_shapes(path, {name: shape_of(parts) for name, parts in tensors.items()}, wanted, remedy)
    for key in shape.stated:
        in_model, in_file = getattr(cfg, key, None), getattr(stated_by, key)
        if in_model != in_file:
            raise UserError(f"{key} {in_file} in the file, {in_model} in model.{key}", str(path), remedy, CHECKPOINT)
    if "n_head" not in shape.stated and cfg.n_head == shape.n_head:
        say = log.info if shape.n_embd in GPT2_WIDTHS else log.warning
        wide = shape.n_embd // shape.n_head
        say(f"{path.name} does not say how many heads: {shape.n_head} of {wide} numbers; if not, set model.n_head=...")
    if "n_head" not in shape.stated and getattr(cfg, "gelu", None) == shape.gelu == "exact":
        log.info(f"exact GELU, as nanoGPT has it; if {path.name} is not nanoGPT's, set model.gelu=tanh")
    if getattr(cfg, "gelu", None) != shape.gelu:
        log.warning(f"model.gelu is {cfg.gelu}; a model of this kind has usually learned with {shape.gelu}")
    return model, tensors


def check_shapes(path: Path, shapes: dict[str, list[int]], wanted: dict[str, torch.Size], remedy: str) -> None:
    """Raises UserError (3) naming the first tensor that differs, or those that the model has no place for."""
    for name, shape in wanted.items():
        in_file = shapes.get(name, "missing")
        if in_file != list(shape):
            what = f"tensor {name}: {in_file} in the file, {list(shape)} in the model"
            raise UserError(what, str(path), remedy, CHECKPOINT)
    extra = [f"{escape(name)} {shape}" for name, shape in shapes.items() if name not in wanted]
    if extra:
        more = f" and {len(extra) - 5} more" if extra[5:] else ""
        what = f"{count(len(extra), 'tensor')} that the model has no place for: {', '.join(extra[:5])}{more}"
        if "lm_head.weight" in shapes and "lm_head.weight" not in wanted:
            remedy = "model.tie_weights=false, for a head that is a matrix of its own"
        if any(".lora_" in name for name in shapes):
            remedy = (
                "merge the adapters with peft (merge_and_unload) and save that, or save them alone (save_pretrained)"
            )
        raise UserError(what, str(path), remedy, CHECKPOINT)
