"""Gives the weights of a model the form in which generating text reads them: float32, bfloat16, int8 or int4."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.errors import UserError, one_line
from gpt.generation.packed_linear import Bfloat16Linear, Int4Linear, Int8Linear, PackedLinear
from gpt.generation.row_products import least_seconds
from gpt.machine import device
from gpt.model import LanguageModel

log = logging.getLogger(__name__)

LAYERS: dict[str, type[PackedLinear]] = {"bfloat16": Bfloat16Linear, "int8": Int8Linear, "int4": Int4Linear}
PROBE = 128  # rows and columns of the matrix that a device is asked to multiply with
MEASURED = 2**24  # bytes of float32 weights that the speed of products is measured with; a smaller model is fast anyway
SLOW = 1.5  # times as long as in float32


class Table(nn.Embedding):
    """An embedding whose numbers are bfloat16, and come out as float32: the stream that they enter is a long sum."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def prepare(model: LanguageModel, precision: str) -> LanguageModel:
    """The same model, on its device, with the weights of its blocks and of its head in this form; float32 changes
    nothing. Adapters must have been merged.

    The stream and the norms stay in float32; outputs of layers, and so keys and values, are bfloat16, and so are the
    tables of embeddings, of which a token needs a row or two. A head that is the embedding becomes a matrix of its own.
    Raises UserError (2) for a precision that the device has no operators for.
    """
    if precision == "float32":
        return model
    layer = LAYERS[precision]
    check(precision, model.head.device)
    with torch.no_grad():
        for block in model.blocks:
            replace(block, nn.Linear, lambda linear: layer.of(linear.weight, linear.bias))
        model.packed_head = layer.of(model.head if model.logit_softcap else centred(model.head))
        replace(model, nn.Embedding, table)
        if not model.config.tie_weights:
            without_head(model)
    return ready(model, precision)


def ready(model: LanguageModel, precision: str) -> LanguageModel:
    """Chooses the type of the products of many rows for a model that is packed, and warns of slow ones of one row."""
    where = model.packed_head.device
    products = device.choose_dtype("auto", where) if where.type == "cpu" else torch.bfloat16
    for layer in packed_layers(model):
        layer.products = products
    own, plain = seconds_of_products(model)
    if own > SLOW * plain:
        slower = f"products with one row take {own / plain:.1f} times as long as in float32"
        log.warning(f"precision={precision} is slow on this processor: {slower}; precision=float32 is faster")
    return model


def without_head(model: LanguageModel) -> None:
    """Frees an untied head that has been packed; what is left of it says on which device it was."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.new_empty(0, model.config.n_embd), requires_grad=False)


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def replace(parent: nn.Module, kind: type[nn.Module], changed: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces each module of a kind below another."""
    for name, child in parent.named_children():
        if isinstance(child, kind):
            setattr(parent, name, changed(child))
        else:
            replace(child, kind, changed)


def table(embedding: nn.Embedding) -> Table:
    weight = embedding.weight.detach().bfloat16()
    return Table(*weight.shape, _weight=weight).requires_grad_(False)


def centred(head: Tensor) -> Tensor:
    """(V, C) less the mean of its rows, which moves all logits by the same number and so changes no probability.

    Trained heads have a large one: logits of GPT-2 are around -100, where bfloat16 has steps of 0.5.
    """
    return head.float() - head.float().mean(0)


def check(precision: str, where: torch.device, instead: str = "precision=float32") -> None:
    """Compares a small product of one row with what it must be. Raises UserError (2) where a device has no operator for
    it, or another one; its remedy is to use `instead`, or the CPU."""
    weight = torch.linspace(-1, 1, PROBE * PROBE).view(PROBE, PROBE).sin()
    row = torch.linspace(-1, 1, PROBE)[None].to(torch.bfloat16)
    try:
        layer = LAYERS[precision].of(weight.to(where))
        wanted = row.double() @ layer.dequantised(torch.float32).cpu().double().t()
        error = (layer(row.to(where)).cpu() - wanted).abs().max() / wanted.abs().max()
        reason = "" if error < 0.05 else f"a product is wrong by {error:.0%}"
    except (RuntimeError, NotImplementedError) as fault:
        reason = one_line(fault, 100)
    if reason:
        what = f"precision={precision} is not supported on {where.type}"
        raise UserError(what, reason, f"use {instead}" + (", or device=cpu" if where.type != "cpu" else ""))


def seconds_of_products(model: LanguageModel) -> tuple[float, float]:
    """Seconds for products of one row with some layers as they are packed, and in float32; nothing on GPUs, and for
    models that are too small to be slow."""
    layers: list[PackedLinear] = []
    for layer in packed_layers(model.blocks):
        layers.append(layer)
        if 4 * sum(one.in_features * one.out_features for one in layers) >= MEASURED:
            break
    else:
        return 0.0, 0.0
    if model.packed_head.device.type != "cpu":
        return 0.0, 0.0
    with torch.inference_mode():
        rows = {layer.in_features: torch.ones(1, layer.in_features) for layer in layers}
        plain = [layer.dequantised(torch.float32) for layer in layers]
        own = least_seconds(lambda: [layer(rows[layer.in_features]) for layer in layers])
        return own, least_seconds(lambda: [F.linear(rows[matrix.shape[1]], matrix) for matrix in plain])
