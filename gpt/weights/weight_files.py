"""Reads weights from files of any kind: mapped into memory, verified where the format has checksums, and renamed to
ours. Nothing is copied, and nothing in a file is executed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt import lora
from gpt.config.schema import LoRAConfig
from gpt.data import unread_formats
from gpt.errors import CHECKPOINT, UserError, unusable
from gpt.files import hub
from gpt.files.atomic import sha256
from gpt.files.tensor_files import forget, read_safetensors, read_torch
from gpt.files.tensor_shards import Parts, joined, shape_of
from gpt.runs import model_file
from gpt.runs.manifest import Identity
from gpt.terminal.console import escape
from gpt.tokenizer import TOKENIZERS
from gpt.weights import tensor_names, tf_bundle
from gpt.weights.source import Architecture, Source, of_model, read_json
from gpt.weights.tensor_names import Recognised

WRAPPED = ("model", "model_state_dict", "state_dict", "weights")  # where training programs keep the weights in a file
NANOGPT = "model_args"  # where nanoGPT keeps the shape of the model; its "config" is of the training program
SETTINGS = ("config", "cfg", "model_config", "hparams", "hyper_parameters")  # ... and where others do
HEADS = ("n_head", "n_heads", "num_heads")
WIDTH_OF_A_HEAD = 64
SUMS = "SHA256SUMS"
Adapters = dict[str, tuple[Tensor, Tensor, float]]  # by the name of the weight: A, B, alpha / rank


@dataclass(frozen=True)
class Weights:
    """Tensors under our names, and what they are. `about`: of which layout, for people."""

    path: Path
    files: list[Path]
    about: str
    architecture: Architecture
    tensors: dict[str, Parts]
    identity: Identity | None = None  # of a model of this project
    step: int = 0  # that it was trained to
    adapters: Adapters = field(default_factory=dict)  # to be added to tensors: folding them now would copy these

    def hashes(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {path.name: sha256(path) for path in self.files}


def read(source: Source) -> Weights:
    """The weights that have been found. Raises UserError (3) for what is damaged, unsafe or no GPT-2."""
    path = source.path
    settings: dict[str, Any] = {}
    if source.kind == "own":
        return of_this_project(*model_file.read_directory(path))
    files = [path]
    refuse_other_formats(path)
    stated = source.stated()  # before gigabytes of another family
    if source.kind == "transformers":
        verify(path / "config.json")
        tensors, files = read_directory(path)
    elif source.kind == "tensorflow":
        tensors, files = read_bundle(path)
    elif path.suffix == ".safetensors":
        verify(path)
        tensors = read_safetensors(path)
    else:
        content = read_torch(path)
        if model_file.is_model(content):
            return of_this_project(*model_file.read_content(content, path))
        tensors, settings = unwrapped(content, path)
    check_types(tensors, path)
    if stated and stated.model:
        named = tensor_names.without_prefix(tensors)
        return Weights(path, files, f"{stated.model.family} as transformers has it", stated, named)
    recognised = tensor_names.recognise(tensors)
    if recognised is None:
        names = ", ".join(escape(name) for name in list(tensors)[:5])
        what = f"no GPT-2 in a layout that is known; its tensors are {names}, ..."
        raise UserError(what, str(path), "", CHECKPOINT)
    about, parts, missing = recognised.layout, recognised.parts, recognised.missing
    if missing:
        more = f" and {len(missing) - 5} more" if missing[5:] else ""
        raise UserError(f"{about}, but without {', '.join(missing[:5])}{more}", str(path), "", CHECKPOINT)
    if recognised.prefix:
        about += f", its names without their prefix {escape(recognised.prefix)}"
    return Weights(path, files, about, stated or architecture_of(recognised, settings, path), parts)


def of_this_project(
    identity: Identity, step: int, tensors: dict[str, Parts], files: list[Path], path: Path
) -> Weights:  # fmt: skip
    """A model of this project, whose tensors are in these files."""
    m = identity.model
    for number in range(max(map(len, tensors.values()), default=0)):
        check_types({name: parts[number] for name, parts in tensors.items() if number < len(parts)}, path)
    suffixes = lora.SUFFIXES if identity.lora else ()
    parts = {name: tensor for name, tensor in tensors.items() if not name.endswith(suffixes)}
    adapters: Adapters = {}
    if identity.lora:
        halves = {name: tensor for name, tensor in tensors.items() if name.endswith(suffixes)}
        adapters = pair_adapters(halves, parts, identity.lora, path)
        if len(adapters) != m.n_layer * len(identity.lora.targets):
            raise unusable(path, f"{len(adapters)} adapters for {m.n_layer} layers")
    shape = of_model(m, identity.vocab_size, identity.tokenizer if identity.tokenizer in TOKENIZERS else str(path))
    return Weights(path, files, "a model of this project", shape, parts, identity, step, adapters)


def read_bundle(directory: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """The tensors of a directory of OpenAI's, and its files. Raises UserError (3)."""
    prefix = tf_bundle.prefix_of(directory)
    if prefix is None:
        raise UserError("no TensorFlow checkpoint", str(directory), "model.ckpt.index is missing", CHECKPOINT)
    return tf_bundle.read(prefix), sorted(directory.glob(f"{prefix.name}.data-*"))


def read_directory(directory: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """The tensors of a directory that transformers wrote, in one file or several (shards), safetensors or torch's, and
    these files. Raises UserError (3)."""
    names = hub.weights_among({path.name for path in directory.iterdir()}, lambda name: directory / name)
    if not names:
        raise UserError(f"neither {' nor '.join(hub.KINDS)}", str(directory), "put it there", CHECKPOINT)
    *index, files = [names] if len(names) == 1 else [names[0], names[1:]]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(f"shard {escape(file)} is missing", str(directory), f"{index[0]} names it", CHECKPOINT)
        refuse_other_formats(directory / file)
        verify(directory / file)
        tensors |= (read_safetensors if file.endswith(".safetensors") else read_torch)(directory / file)
    if index:
        lost = sorted(read_json(directory / index[0])["weight_map"].keys() - tensors.keys())
        if lost:
            raise unusable(directory / index[0], f"tensor {escape(lost[0])} is in none of its {len(files)} files")
    return tensors, [directory / file for file in files]


def refuse_other_formats(path: Path) -> None:
    """Raises UserError (3) for what often lies where weights should: a pointer of Git LFS, or a web page."""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(unread_formats.N_BYTES)
        if start.lstrip()[:1] in (b"<", b"v"):
            try:
                unread_formats.refuse(path, start)
            except UserError as error:
                raise UserError(error.what, error.where, error.remedy, CHECKPOINT) from None


def verify(path: Path) -> None:
    """Compares a file with the sha256 that a SHA256SUMS beside it has for it, if there is one: safetensors themselves
    have no checksum. Raises UserError (3)."""
    if not (path.parent / SUMS).exists():
        return
    wanted = sums_in(path.parent)
    if path.name in wanted and sha256(path) != wanted[path.name]:
        raise unusable(path, f"sha256 is not that of {SUMS}")


def sums_in(directory: Path) -> dict[str, str]:
    """The sha256 of each file that SHA256SUMS names. Raises OSError."""
    content = (directory / SUMS).read_text(encoding="utf-8", errors="replace")
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](.+)$", content, re.M)}


def unwrapped(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of torch.save, bare or under one of WRAPPED or the only key that has some, and the settings
    beside them. Raises UserError (3)."""
    if not isinstance(content, dict):
        raise UserError("no tensors with names in it", str(path), "", CHECKPOINT)
    settings = _settings(content, [NANOGPT] if NANOGPT in content else SETTINGS)
    inner = next((content[key] for key in WRAPPED if isinstance(content.get(key), dict)), content)
    if tensors := _named_tensors(inner):
        return tensors, settings
    found = [key for key, value in content.items() if _named_tensors(value)]
    if len(found) == 1:
        return _named_tensors(content[found[0]]), settings
    keys = ", ".join(escape(str(key)[:40]) for key in list(found or content)[:8])
    what = f"weights under several keys, {keys}" if found else f"no tensors with names in it; its keys are {keys}"
    raise UserError(what, str(path), "save the state_dict of the model alone", CHECKPOINT)


def _settings(content: dict[Any, Any], keys: Sequence[str]) -> dict[str, Any]:
    """What stands under some keys, one of which may hold another, as Lightning's hyper_parameters a config."""
    settings: dict[str, Any] = {}
    for key in keys:
        if isinstance(content.get(key), dict):
            settings |= _settings(content[key], keys) | content[key]
    return settings


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """Those of a dict's values that are tensors; none where they are not all called by a text."""
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: tensor for name, tensor in items if isinstance(tensor, Tensor)}
    return tensors if all(isinstance(name, str) for name in tensors) else {}


def check_types(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises UserError (3) for integers, quantised and sparse tensors, and for one that claims more than it has."""
    for name, tensor in tensors.items():
        is_odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta
        if is_odd or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise unusable(path, f"tensor {escape(name)} is no ordinary one")
        if not tensor.is_floating_point() and not tensor_names.MASKS.search(name):
            raise unusable(path, f"tensor {escape(name)} is of {tensor.dtype}, and no floating-point numbers")


def pair_adapters(
    tensors: Mapping[str, Tensor | Parts], weights: dict[str, Parts], cfg: LoRAConfig, path: Path
) -> Adapters:  # fmt: skip
    """A and B of each layer in the file `path`, under the name of the weight that they change.

    Raises UserError (3) where one of them is missing, or does not fit the weight: the product of two small ones could
    be of any size."""
    adapters: Adapters = {}
    for layer in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        a, b = (tensors.get(f"{layer}{suffix}") for suffix in lora.SUFFIXES)
        if a is None or b is None:
            raise unusable(path, f"adapter {escape(layer)}: one half is missing")
        weight = f"{layer}.weight"
        shape = shape_of(weights[weight]) if weight in weights else []
        if len(shape) != 2 or [shape_of(a), shape_of(b)] != [[cfg.rank, shape[1]], [shape[0], cfg.rank]]:
            what = f"adapter {escape(layer)}: A {shape_of(a)} and B {shape_of(b)}, rank {cfg.rank}"
            raise unusable(path, f"{what}, do not fit the weight, which is {shape or 'missing'}")
        adapters[weight] = joined(a), joined(b), cfg.alpha / cfg.rank
    return adapters


def architecture_of(recognised: Recognised, settings: dict[str, Any], path: Path) -> Architecture:
    """The architecture that shapes tell, and what they do not, by the settings in the file or else by what is usual:
    the number of heads by the width of GPT-2's, the GELU by the layout. Raises UserError (3) for a variant of GPT-2."""
    parts = recognised.parts
    sizes = {name: shape_of(parts[name]) if name in parts else [] for name in ("wte.weight", "wpe.weight")}
    if [len(size) for size in sizes.values()] != [2, 2] or any(0 in size for size in sizes.values()):
        raise unusable(path, "no embeddings of tokens and positions")
    [n_vocab, n_embd], [n_positions, _] = sizes.values()
    n_layer = len({name.split(".")[1] for name in parts if re.match(r"h\.\d+\.", name)})
    is_nanogpt = "block_size" in settings
    if is_nanogpt:
        known = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
        others = [f"{key}={v}" for key, v in settings.items() if key not in known and not (v is None or v is False)]
        if others:
            what = f"a variant of nanoGPT: {escape(', '.join(others)[:200])}"
            raise UserError(what, str(path), "only GPT-2 can be read", CHECKPOINT)
    heads = (settings.get(key) for key in HEADS)
    n_head = next((n for n in heads if type(n) is int and 0 < n < 2**31), None)
    stated = ("n_head",) if n_head else ()
    head = parts.get("lm_head.weight")
    tied = head is None or same(head, parts["wte.weight"])
    if n_head is None:  # the most heads that are no narrower than GPT-2's
        n_head = next(n for n in range(max(1, n_embd // WIDTH_OF_A_HEAD), 0, -1) if n_embd % n == 0)
    # nn.GELU() in nanoGPT's model.py, whose head is always tied; in minGPT, with the same names, neither is so.
    gelu = "exact" if is_nanogpt or (recognised.layout == tensor_names.NANOGPT and tied) else "tanh"
    return Architecture(max(1, n_layer), n_head, n_embd, n_positions, n_vocab, tied, gelu, stated)


def same(a: Parts, b: Parts) -> bool:
    """Whether two matrices are equal, without having both in memory."""
    if shape_of(a) != shape_of(b) or len(a) + len(b) > 2 or not a[0].dim():
        return False
    for rows in zip(a[0].split(4096), b[0].split(4096), strict=True):
        if not torch.equal(*rows):
            return False
        for part in rows:
            forget(part)
    return True
