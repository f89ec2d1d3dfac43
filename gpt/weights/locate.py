"""Finds the weights that `init.from` and `checkpoint` name, on the disk or on the hub. No torch."""

import logging
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gpt.errors import CHECKPOINT, UserError
from gpt.files import hub, hub_names, paths
from gpt.terminal.console import escape
from gpt.weights.source import Architecture, Source, of_transformers, read_json

log = logging.getLogger(__name__)

UNDERSTOOD = (
    "a run or checkpoint of this project, a directory of transformers, one of OpenAI's TensorFlow files, an adapter of "
    "peft's, "
    f"a .safetensors, .pt or .pth file; or from the hub: {', '.join(hub.PINNED)}, <owner>/<name>"
)

ADAPTER, ADAPTER_WEIGHTS, LAST_MODEL = "adapter_config.json", "adapter_model.safetensors", "last_model.pt"
PRETRAINED = {"gpt2": "pretrained", "modern": "pretrained_modern"}  # files of conf/model/, by family
# Files that a person may name and mean the directory that they are a part of; so are a TensorFlow checkpoint's.
PARTS = (
    *hub.KINDS, *map(hub.index_of, hub.KINDS), "config.json", "manifest.json", "hparams.json", "checkpoint", ADAPTER,
    ADAPTER_WEIGHTS,
)  # fmt: skip
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # what files end with that may be weights themselves


def find(name: str, revision: str | None, root: Path) -> Source:
    """Where the weights called `name` are; those of the hub are downloaded. Raises UserError for what is not there (3)
    or cannot be had (5). Relative paths begin at `root`; a folder that is called gpt2 is ./gpt2."""
    path = root / os.path.expanduser(name)
    if hub_names.is_repository(name, root):
        try:
            path = fetched(name, revision, root / "outputs" / "weights" / name)
        except UserError as error:  # it may have been a path, with a slip of the pen
            here = "" if name in hub_names.PINNED else f"; nor is it a folder or file here, {path}"
            raise UserError(error.what + here, error.where, error.remedy, error.code) from error
        return Source(name, path, "transformers", path.name if path.parent.name == "snapshots" else None)
    if not path.is_file() and not path.is_dir():
        what = "not an ordinary file" if path.exists() else "no such file or directory"
        raise UserError(what, str(path), paths.elsewhere(path) or UNDERSTOOD, CHECKPOINT)
    if path.is_file():
        is_part = path.name in PARTS or SHARD.fullmatch(path.name) or path.suffix in (".index", ".meta")
        is_part = is_part or ".data-" in path.name
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


def kind_of(directory: Path) -> Literal["own", "transformers", "tensorflow", "adapter"] | None:
    """By the files that only one kind of directory has."""
    if (directory / "manifest.json").exists() or (directory / "checkpoints").is_dir():
        return "own"
    if (directory / "config.json").exists():
        return "transformers"
    if (directory / "hparams.json").exists() or any(directory.glob("*.index")):
        return "tensorflow"
    if (directory / ADAPTER).exists():
        return "adapter"
    return None


def nothing_in(directory: Path) -> UserError:
    """The error for a directory without weights that can be read."""
    entries = sorted(directory.iterdir())
    if not entries:
        return UserError("an empty directory", str(directory), UNDERSTOOD, CHECKPOINT)
    below = [entry for entry in entries if entry.is_dir() and kind_of(entry)]
    files = [entry for entry in entries if entry.suffix in WEIGHTS and not SHARD.fullmatch(entry.name)]
    files = [entry for entry in files if entry.name != ADAPTER_WEIGHTS]
    what = "no config.json beside the weights: " if files else "no weights: "
    what += ", ".join(entry.name for entry in entries[:5]) + (", ..." if entries[5:] else "")
    if len(below) > 1:  # no guess which of them: the first by name may be the worst
        names = ", ".join(entry.name for entry in below[:5]) + (", ..." if below[5:] else "")
        ranked = ", which leaderboard.md ranks" if (directory / "leaderboard.md").exists() else ""
        remedy = f"name one of its {len(below)} runs{ranked}: {names}"
    else:
        meant = (below or files or [None])[0]
        remedy = f"did you mean {meant}?" if meant else UNDERSTOOD
    return UserError(what, str(directory), remedy, CHECKPOINT)


def architecture(source: Source, root: Path) -> Architecture:
    """What the weights are, by their own configuration, or by the weights themselves (which loads torch)."""
    if source.kind == "adapter":
        return architecture(base_of(source, root), root)
    if stated := source.stated():
        return replace(stated, tokenizer=own_tokenizer(source))
    from gpt.weights import weight_files

    return weight_files.read(source).architecture


def base_of(source: Source, root: Path) -> Source:
    """The weights that an adapter of peft's is for. Raises UserError (3), (5) with what to do where they are not."""
    config = source.path / ADAPTER
    content = read_json(config)
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    beside = source.path.parent / LAST_MODEL
    remedy = f"the merged model is {beside}" if beside.exists() else f"name the model in {config}"
    if not isinstance(name, str) or not name:
        raise UserError("an adapter that does not say which model it is for", str(source.path), remedy, CHECKPOINT)
    near = source.path / name
    try:
        base = find(str(near) if near.exists() else name, revision if isinstance(revision, str) else None, root)
    except UserError as error:
        what = f"the model that the adapter is for, {escape(name)}: {error.what}"
        raise UserError(what, error.where, remedy, error.code) from error
    if base.kind == "adapter":
        raise UserError("the model that the adapter is for is an adapter", str(base.path), remedy, CHECKPOINT)
    return base


@cache  # each of a sweep's jobs asks for each of its values
def setting(name: str | None, revision: str | None, root: Path, key: str) -> Any:
    """A value of the model section that fits the weights called `name`. Raises UserError."""
    if name is None:
        raise UserError("model=pretrained takes the architecture from weights", "init.from", "set init.from=gpt2")
    if key == "name":
        return Path(name).name or (root / name).resolve().name or "model"  # init.from=. has none
    found = _architecture(name, revision, root)
    place = found if key == "tokenizer" else found.model or found
    if not hasattr(place, key):
        what = f"it has no {key}: it is of the family {found.family}"
        remedy = f"set model={PRETRAINED[found.family]}" if found.family in PRETRAINED else ""
        raise UserError(what, name, remedy)
    return getattr(place, key)


def choice(name: str, revision: str | None, root: Path) -> str:
    """The file of conf/model/ for the architecture of the weights called `name`. Raises UserError."""
    if name in hub_names.PINNED:
        return PRETRAINED["gpt2"]
    return PRETRAINED.get(_architecture(name, revision, root).family, PRETRAINED["gpt2"])


@cache
def _architecture(name: str, revision: str | None, root: Path) -> Architecture:
    return architecture(find(name, revision, root), root)


# Where a directory keeps its vocabulary, token -> id: a file and the keys that lead to it.
VOCABULARIES = {
    "transformers": (("vocab.json", ()), ("tokenizer.json", ("model", "vocab"))),
    "tensorflow": (("encoder.json", ()),),
}


def own_tokenizer(source: Source) -> str:
    """What the tokenizer of weights from elsewhere is called: its folder, or "gpt2" where it is that, or none is there.
    Raises UserError (3) for files that are damaged."""
    from gpt import tokenizer  # not at every start

    path = source.path / tokenizer.FILE
    if source.kind != "transformers" or not path.exists():
        return "gpt2"
    model = read_json(path).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return str(source.path) if tokenizer.vocabulary_difference("gpt2", vocabulary) else "gpt2"


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
            difference = tokenizer.vocabulary_difference(named, vocabulary)
            if difference:
                own = own_tokenizer(source) if file == tokenizer.FILE else named
                remedy = f"data.tokenizer={own} is their own tokenizer" if own != named else ""
                raise UserError(f"another vocabulary than that of {named}: {difference}", str(path), remedy, CHECKPOINT)
            return
    log.info(f"no tokenizer in {source.path}: its tokens are taken to be those of {named}")
