"""Translates the names that other projects give the tensors of a GPT-2. No file is read here.

Ours are the names of OpenAI's code, as transformers and nanoGPT have them too (wte, wpe, h.0.attn.c_attn, ...), and our
matrices are (out, in). A tensor may consist of several of theirs, one below the other: `Parts`.
"""

import re
from collections.abc import Callable

from torch import Tensor

Parts = tuple[Tensor, ...]
Tensors = dict[str, Tensor]

# What wraps a model puts its own word before the names: torch.compile, data parallelism, Lightning, transformers.
PREFIX = re.compile(r"^(_orig_mod\.|module\.|model\.|transformer\.)+")
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|trf_blocks\.\d+\.att\.mask")  # of causal attention; not learned
MATRIX = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


def recognise(tensors: Tensors) -> tuple[str, dict[str, Parts]] | None:
    """Whose layout some tensors have, in words, and the tensors under our names; None for an unknown one."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        short = PREFIX.sub("", name.replace("_orig_mod.", ""))
        if not MASKS.fullmatch(short):
            plain[name if short in plain else short] = tensor  # a second one is a stranger, not the same
    for first, layout in LAYOUTS.items():
        if first in plain:
            return layout(plain)
    return None


def gpt2(tensors: Tensors) -> tuple[str, dict[str, Parts]]:
    """transformers keeps its matrices as (in, out), nanoGPT and this project as (out, in)."""
    c_attn = tensors.get("h.0.attn.c_attn.weight")
    is_conv1d = c_attn is not None and c_attn.dim() == 2 and c_attn.shape[1] == 3 * c_attn.shape[0]
    if not is_conv1d:
        return "GPT-2 as nanoGPT has it", {name: (tensor,) for name, tensor in tensors.items()}
    turned = {name: (turn(tensor) if MATRIX.fullmatch(name) else tensor,) for name, tensor in tensors.items()}
    return "GPT-2 as transformers has it", turned


def openai(tensors: Tensors) -> tuple[str, dict[str, Parts]]:
    """OpenAI's variables: model/h0/attn/c_attn/w, (1, in, out) for matrices."""
    words = {"w": "weight", "b": "bias", "g": "weight"}
    renamed = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("model/").split("/")
        if re.fullmatch(r"h\d+", path[0]):
            path[:1] = ["h", path[0][1:]]
        path[-1:] = [path[-1], "weight"] if path[-1] in ("wte", "wpe") else [words.get(path[-1], path[-1])]
        if path[-1] == "weight" and tensor.dim() == 3 and tensor.shape[0] == 1:
            tensor = tensor[0].T
        renamed[".".join(path)] = (tensor,)
    return "GPT-2 as OpenAI released it", renamed


BOOK = {
    "tok_emb": "wte", "pos_emb": "wpe", "final_norm": "ln_f", "out_head": "lm_head", "norm1": "ln_1", "norm2": "ln_2",
    "att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj",
}  # fmt: skip
QKV = ("W_query", "W_key", "W_value")


def book(tensors: Tensors) -> tuple[str, dict[str, Parts]]:
    """Raschka, "Build a Large Language Model (From Scratch)": queries, keys and values are three layers."""
    renamed: dict[str, Parts] = {}
    left = dict(tensors)
    for name in tensors:
        block, _, leaf = name.partition(".att.W_query.")
        parts = [f"{block}.att.{word}.{leaf}" for word in QKV]
        if leaf and all(part in tensors for part in parts):
            renamed[f"h.{block.removeprefix('trf_blocks.')}.attn.c_attn.{leaf}"] = tuple(
                left.pop(part) for part in parts
            )
    for name, tensor in left.items():
        block = re.match(r"trf_blocks\.(\d+)\.", name)
        layer, _, leaf = name[block.end() if block else 0 :].rpartition(".")
        leaf = {"scale": "weight", "shift": "bias"}.get(leaf, leaf)
        new_name = f"{BOOK[layer]}.{leaf}" if layer in BOOK else name
        renamed[f"h.{block[1]}.{new_name}" if block and layer in BOOK else new_name] = (tensor,)
    return "GPT-2 as the book has it", renamed


LAYOUTS: dict[str, Callable[[Tensors], tuple[str, dict[str, Parts]]]] = {
    "model/wte": openai,
    "tok_emb.weight": book,
    "wte.weight": gpt2,
}


def turn(tensor: Tensor) -> Tensor:
    """(in, out) -> (out, in)"""
    return tensor.T if tensor.dim() == 2 else tensor


def shape(parts: Parts) -> list:
    """Of the parts together, one below the other; of each where they do not fit so."""
    shapes = [list(part.shape) for part in parts]
    if len(parts) == 1:
        return shapes[0]
    fits = all(shapes) and all(one[1:] == shapes[0][1:] for one in shapes)
    return [sum(one[0] for one in shapes), *shapes[0][1:]] if fits else shapes


def missing_biases(tensors: dict[str, Parts], wanted: list[str]) -> list[str]:
    """The biases that a model was made without, all (nanoGPT's bias=False) or those of queries, keys and values (the
    book's qkv_bias=False): it is one whose biases are 0. Others that are missing are damage, and not among them."""
    biases = [name for name in wanted if name.endswith(".bias")]
    of_qkv = [name for name in biases if name.endswith("c_attn.bias")]
    return next((names for names in (biases, of_qkv) if not any(name in tensors for name in names)), [])
