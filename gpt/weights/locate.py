"""What `init.from` and `checkpoint` name: where the weights are, of which kind, and of which architecture. No torch."""

import json
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gpt.errors import CHECKPOINT, UserError, unusable
from gpt.files import hub

log = logging.getLogger(__name__)

LARGEST_JSON = 2**26  # bytes; a tokenizer's file has some millions
UNDERSTOOD = (
    "a run or checkpoint of this project, a directory of transformers, one of OpenAI's TensorFlow files, "
    f"a .safetensors, .pt or .pth file; or from the hub: {', '.join(hub.PINNED)}, <owner>/<name>"
)

# Files that a person may name and mean the directory that they are a part of; so are a TensorFlow checkpoint's.
PARTS = ("model.safetensors", "pytorch_model.bin", "config.json", "manifest.json", "hparams.json", "checkpoint")


@dataclass(frozen=True)
class Source:
    """Weights that have been found, but not read. `kind` "file" is one whose content says what it is."""

    name: str  # as it was typed
    path: Path
    kind: Literal["own", "transformers", "tensorflow", "file"]
    revision: str | None = None  # of the hub


@dataclass(frozen=True)
class Architecture:
    """The shape of a GPT-2. `stated`: what the file says itself; the rest follows from shapes, or is what is usual."""

    n_layer: int
    n_head: int
    n_embd: int
    context_length: int
    vocab_size: int
    tie_weights: bool = True
    gelu: Literal["tanh", "exact"] | None = "tanh"  # None: of another family
    stated: tuple[str, ...] = ("n_head",)


def find(name: str, revision: str | None, root: Path) -> Source:
    """Where the weights called `name` are; those of the hub are downloaded. Raises UserError for what is not there (3)
    or cannot be had (5). Relative paths begin at `root`; a folder that is called gpt2 is ./gpt2."""
    path = root / os.path.expanduser(name)
    is_repository = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if name in hub.PINNED or (is_repository and not path.exists() and not path.parent.exists()):
        path = fetched(name, revision, root / "outputs" / "weights" / name)
        return Source(name, path, "transformers", path.name if path.parent.name == "snapshots" else None)
    if not path.is_file() and not path.is_dir():
        what = "not an ordinary file" if path.exists() else "no such file or directory"
        raise UserError(what, str(path), UNDERSTOOD, CHECKPOINT)
    if path.is_file():
        is_part = path.name in PARTS or path.suffix in (".index", ".meta") or ".data-" in path.name
        is_part = is_part and not (path.parent / "checkpoints").exists()  # a run's weights are not beside them
        kind = kind_of(path.parent) if is_part else None
        return Source(name, path.parent, kind) if kind else Source(name, path, "file")
    kind = kind_of(path)
    if kind is None:
        raise nothing_in(path)
    return Source(name, path, kind)


@cache  # a process looks for the architecture, then for the weights, and hashes gigabytes each time
def fetched(name: str, revision: str | None, by_hand: Path) -> Path:
    """A directory with weights of the hub, see gpt/files/hub.py."""
    return hub.fetch(name, revision, by_hand, of_transformers)


def kind_of(directory: Path) -> Literal["own", "transformers", "tensorflow"] | None:
    """By the files that only one kind of directory has."""
    if (directory / "manifest.json").exists() or (directory / "checkpoints").is_dir():
        return "own"
    if (directory / "config.json").exists():
        return "transformers"
    if (directory / "hparams.json").exists() or any(directory.glob("*.index")):
        return "tensorflow"
    return None


def nothing_in(directory: Path) -> UserError:
    """The error for a directory without weights that can be read."""
    entries = sorted(directory.iterdir())
    if not entries:
        return UserError("an empty directory", str(directory), UNDERSTOOD, CHECKPOINT)
    below = [entry.name for entry in entries if entry.is_dir() and kind_of(entry)]
    if (directory / "adapter_config.json").exists():
        what = "adapters alone, without the weights that they belong to"
    else:
        what = "no weights: " + ", ".join(entry.name for entry in entries[:5]) + (", ..." if entries[5:] else "")
    remedy = f"did you mean {directory / below[0]}?" if below else UNDERSTOOD
    return UserError(what, str(directory), remedy, CHECKPOINT)


def architecture(source: Source) -> Architecture:
    """What the weights are, by their own configuration, or by the weights themselves (which loads torch)."""
    if source.kind == "transformers":
        return of_transformers(source.path / "config.json")
    if source.kind == "tensorflow":
        return of_openai(source.path / "hparams.json")
    from gpt.weights import weight_files

    return weight_files.read(source).architecture


@cache  # each of a sweep's jobs asks for each of its values
def setting(name: str | None, revision: str | None, root: Path, key: str) -> Any:
    """A value of the model section that fits the weights called `name`. Raises UserError."""
    if name is None:
        raise UserError("model=pretrained takes the architecture from weights", "init.from", "set init.from=gpt2")
    if key == "name":
        return Path(name).name or (root / name).resolve().name or "model"  # init.from=. has none
    return getattr(_architecture(name, revision, root), key)


@cache
def _architecture(name: str, revision: str | None, root: Path) -> Architecture:
    return architecture(find(name, revision, root))


def of_openai(path: Path) -> Architecture:
    """From OpenAI's hparams.json."""
    n = integers(path, read_json(path), "n_layer", "n_head", "n_embd", "n_ctx", "n_vocab")
    return Architecture(n["n_layer"], n["n_head"], n["n_embd"], n["n_ctx"], n["n_vocab"])


# What transformers' configuration can say that is not in our model; its own values where it does not say anything.
FIXED = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}  # fmt: skip
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "exact", "gelu_python": "exact"}


def of_transformers(path: Path) -> Architecture:
    """From transformers' config.json. Raises UserError (3) for another family, and for another kind of GPT-2."""
    config = read_json(path)
    family = config.get("model_type")
    if family != "gpt2":
        classes = config.get("architectures")
        named = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
        raise UserError(f"a {family} model{named}, not GPT-2", str(path), "only GPT-2 can be read", CHECKPOINT)
    n = integers(path, config, "n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    wanted = FIXED | {"n_inner": 4 * n["n_embd"]}
    found = {key: config.get(key, value) for key, value in wanted.items()}
    found["n_inner"] = found["n_inner"] or wanted["n_inner"]
    others = [f"{key} {found[key]}, not {value}" for key, value in wanted.items() if found[key] != value]
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GELU:
        others.append(f"activation_function {activation}, not gelu_new")
    if others:
        raise UserError("another kind of GPT-2: " + "; ".join(others), str(path), "", CHECKPOINT)
    return Architecture(
        n["n_layer"], n["n_head"], n["n_embd"], n["n_positions"], n["vocab_size"],
        bool(config.get("tie_word_embeddings", True)), GELU[activation], ("n_head", "gelu"),
    )  # fmt: skip


def integers(path: Path, content: dict[str, Any], *keys: str) -> dict[str, int]:
    """The values of some keys, each a whole number from 1 on. Raises UserError (3)."""
    for key in keys:
        if type(content.get(key)) is not int or not 1 <= content[key] < 2**31:
            raise unusable(path, f"{key} is {content.get(key)!r}, not a whole number from 1 on")
    return {key: content[key] for key in keys}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises UserError (3)."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, getattr(error, "strerror", None) or f"not JSON: {error}") from error


# Where a directory keeps its vocabulary, token -> id: a file and the keys that lead to it.
VOCABULARIES = {
    "transformers": (("vocab.json", ()), ("tokenizer.json", ("model", "vocab"))),
    "tensorflow": (("encoder.json", ()),),
}


def check_tokenizer(source: Source, named: str) -> None:
    """Raises UserError (3) when a directory has another vocabulary beside the weights than the tokenizer `named`."""
    from gpt import tokenizer  # not at every start

    if source.kind not in VOCABULARIES:
        return
    for file, keys in VOCABULARIES[source.kind]:
        path = source.path / file
        if path.exists():
            vocabulary: Any = read_json(path)
            for key in keys:
                vocabulary = vocabulary.get(key) if isinstance(vocabulary, dict) else None
            difference = tokenizer.difference(named, vocabulary)
            if difference:
                raise UserError(f"another vocabulary than that of {named}: {difference}", str(path), "", CHECKPOINT)
            return
    log.info(f"no tokenizer in {source.path}: its tokens are taken to be those of {named}")
