"""Translates the names that other projects give the tensors of a model. No file is read here.

Ours of a GPT-2 are the names of OpenAI's code, as transformers and nanoGPT have them too (wte, wpe, h.0.attn.c_attn,
...), and our matrices are (out, in). A tensor may consist of several of theirs, one below the other: `Parts`.
"""

import os.path
import re
from dataclasses import dataclass

from torch import Tensor

from gpt.files.tensor_shards import Parts, Tensors

# What torch.compile, FSDP, checkpointing of activations, data parallelism and peft put between the words of a name.
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_?module|base_layer)\.")
MASKS = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|trf_blocks\.\d+\.att\.mask)$")  # causal; not learned
MATRIX = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
BLOCK = re.compile(r"^((?:model/)?h\.?|trf_blocks\.)(\d+)(?=[./])")  # the number of a block in its tensors' names

# The names of a layout -> ours, with N for the number of a block. Of several names for one tensor, the first is on top.
GPT2 = {
    name: name
    for name in (
        "wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight",
        *(f"h.N.{layer}.{leaf}" for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
          for leaf in ("weight", "bias")),
    )
}  # fmt: skip


def _openai(name: str) -> str:
    """wte.weight -> model/wte, h.N.ln_1.weight -> model/hN/ln_1/g, h.N.mlp.c_fc.weight -> model/hN/mlp/c_fc/w"""
    *path, leaf = ["model", *name.replace("h.N", "hN").split(".")]
    if path[-1] in ("wte", "wpe"):
        return "/".join(path)
    return "/".join([*path, "b" if leaf == "bias" else "g" if path[-1].startswith("ln_") else "w"])


OPENAI = {_openai(name): name for name in GPT2 if name != "lm_head.weight"}

# Raschka, "Build a Large Language Model (From Scratch)": queries, keys and values are three layers.
BOOK = {
    f"{theirs}.{leaf}": f"{own}.{own_leaf}"
    for theirs, own in {
        "tok_emb": "wte", "pos_emb": "wpe", "trf_blocks.N.norm1": "h.N.ln_1", "trf_blocks.N.norm2": "h.N.ln_2",
        "trf_blocks.N.att.W_query": "h.N.attn.c_attn", "trf_blocks.N.att.W_key": "h.N.attn.c_attn",
        "trf_blocks.N.att.W_value": "h.N.attn.c_attn", "trf_blocks.N.att.out_proj": "h.N.attn.c_proj",
        "trf_blocks.N.ff.layers.0": "h.N.mlp.c_fc", "trf_blocks.N.ff.layers.2": "h.N.mlp.c_proj",
        "final_norm": "ln_f", "out_head": "lm_head",
    }.items()
    for leaf, own_leaf in (("scale" if "norm" in theirs else "weight", "weight"),
                           ("shift" if "norm" in theirs else "bias", "bias"))
    if f"{own}.{own_leaf}" in GPT2
}  # fmt: skip

TRANSFORMERS, NANOGPT, BOOKS = "GPT-2 as transformers has it", "GPT-2 as nanoGPT has it", "GPT-2 as the book has it"
PROJECT = "GPT-2 as this project has it"  # which leaves out nanoGPT's word `transformer`
LAYOUTS = {NANOGPT: GPT2, "GPT-2 as OpenAI released it": OPENAI, BOOKS: BOOK}


@dataclass(frozen=True)
class Recognised:
    """Tensors of a known layout under our names; strangers keep theirs. `missing`: what the layout has besides, but
    for biases and the head, which a model may be without. `prefix`: what stood before all of the names."""

    layout: str
    parts: dict[str, Parts]
    missing: list[str]
    prefix: str


def recognise(tensors: Tensors) -> Recognised | None:
    """The layout that has most of the names, whatever they begin with; None where none but the head's is known."""
    plain = {name: WRAPPERS.sub("", name) for name in tensors}
    plain = {name: short for name, short in plain.items() if not MASKS.search(short)}
    known = {layout: _known(plain, table) for layout, table in LAYOUTS.items()}
    layout = max(known, key=lambda name: len(known[name]))
    full_names = known[layout]
    if full_names.keys() <= {"lm_head.weight", "out_head.weight"}:
        return None
    prefix = re.sub(r"[^./]*$", "", os.path.commonprefix([*full_names.values()]))  # noqa: RUF071
    numbers = {match[2] for match in map(BLOCK.match, full_names) if match}
    parts: dict[str, Parts] = {}
    missing: list[str] = []
    taken = set()
    for own in GPT2:
        theirs = [name for name, same in LAYOUTS[layout].items() if same == own]
        for number in map(str, range(len(numbers) if "N" in own else 1)):
            names = [name.replace("N", number) for name in theirs]
            lacking = [name for name in names if name not in full_names]
            if names and not lacking:
                parts[own.replace("N", number)] = tuple(tensors[full_names[name]] for name in names)
                taken |= {full_names[name] for name in names}
            elif len(lacking) < len(names) or not own.endswith((".bias", "lm_head.weight")):
                missing += lacking
    if "wte.weight" not in parts and "lm_head.weight" in parts:  # safetensors.save_model keeps one name of a tied pair
        parts["wte.weight"] = parts.pop("lm_head.weight")
        missing = [name for name in missing if name not in ("wte.weight", "tok_emb.weight")]
    if layout == NANOGPT and any(_is_conv1d(parts.get(f"h.{number}.attn.c_attn.weight")) for number in numbers):
        layout = TRANSFORMERS
    elif layout == NANOGPT and not any("transformer." in name for name in full_names.values()):
        layout = PROJECT
    if layout not in (NANOGPT, PROJECT, BOOKS):
        parts = {name: tuple(map(turn, each)) if MATRIX.fullmatch(name) else each for name, each in parts.items()}
    parts |= {name: (tensors[name],) for name in plain if name not in taken}
    return Recognised(layout, parts, missing, re.sub(r"(transformer\.|model/)$", "", prefix))


def _known(plain: dict[str, str], table: dict[str, str]) -> dict[str, str]:
    """{"h.3.ln_1.bias": "net.h.3.ln_1.bias"}: the names that a layout has, however they begin, and the whole ones."""
    full_names: dict[str, str] = {}
    for name, short in plain.items():
        for start in (0, *(match.end() for match in re.finditer("[./]", short))):
            tail = short[start:]
            if BLOCK.sub(r"\1N", tail, count=1) in table:
                full_names.setdefault(tail, name)  # a second one is a stranger, not the same
                break
    return full_names


def _is_conv1d(parts: Parts | None) -> bool:
    """transformers keeps its matrices as (in, out), nanoGPT and this project as (out, in)."""
    return parts is not None and parts[0].dim() == 2 and parts[0].shape[1] == 3 * parts[0].shape[0]


def turn(tensor: Tensor) -> Tensor:
    """(in, out) -> (out, in); OpenAI's have a 1 before."""
    if tensor.dim() == 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.T if tensor.dim() == 2 else tensor


def without_prefix(tensors: Tensors) -> dict[str, Parts]:
    """Tensors of transformers' Llama or Qwen3 under the names of gpt/modern.py, which lack `model.` at the beginning.
    Frequencies of the rotation, which some files have, are not learned, and left out."""
    plain = {WRAPPERS.sub("", name).removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {name: (tensor,) for name, tensor in plain.items() if not name.endswith("rotary_emb.inv_freq")}


def missing_biases(tensors: dict[str, Parts], wanted: list[str]) -> list[str]:
    """The biases that a model was made without, all (nanoGPT's bias=False) or those of queries, keys and values (the
    book's qkv_bias=False): it is one whose biases are 0. Others that are missing are damage, and not among them."""
    biases = [name for name in wanted if name.endswith(".bias")]
    of_qkv = [name for name in biases if name.endswith("c_attn.bias")]
    return next((names for names in (biases, of_qkv) if not any(name in tensors for name in names)), [])
