"""Reads and checks a directory of prepared data: its meta.json, its files, and whether it is what a run asks for."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from gpt.config.data import DataConfig
from gpt.data import sources, splits, token_files
from gpt.errors import ENVIRONMENT, UserError
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

FORMAT = 1
# A change of one of these needs new files; the other keys of DataConfig are about batches.
SETTINGS = ("name", "kind", "columns", "tokenizer", "template", "max_tokens", "split", "val_fraction", "test_fraction",
            "split_seed", "on_bad_row", "card")  # fmt: skip
HOW_WRITTEN = ("delimiter", "encoding", "document_separator")  # these, too; recorded where they are set
TOKEN_FILES = set(chain.from_iterable(map(token_files.names, splits.NAMES)))
OTHER_FILES = {"README.md", "token_lengths.png", "bad_rows.txt", *(f"{split}.jsonl" for split in splits.NAMES)}
META_LIMIT = 2**26  # bytes of meta.json, enough for 500,000 source files
NONE_YET = "no prepared data yet"


def _record(name: str, **types: Any) -> Any:
    return create_model(name, **{key: (kind, ...) for key, kind in types.items()})


# What is read from meta.json again, with its types; the rest of it is for people.
_FILE, _SPLIT = _record("File", bytes=int, sha256=str), _record("Split", documents=int, tokens=int)
_SOURCE_FILE = _record("SourceFile", file=str, bytes=int, sha256=str)
_SOURCE = _record("Hub", hub=str, revision=str | None) | _record("Files", files=list[_SOURCE_FILE])
_META = _record("Meta", settings=dict[str, Any], source=_SOURCE, tokenizer=str, template=str, n_vocab=int,
                splits=dict[str, _SPLIT], files=dict[str, _FILE], fingerprint=str)  # fmt: skip


def find(cfg: DataConfig, root: Path) -> Path | None:
    """The directory of prepared data, None where `ensure` would prepare it. Writes nothing."""
    return None if why_unready(cfg, root, directory_of(cfg, root)) else directory_of(cfg, root)


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json: settings, source, counts, splits, files and the fingerprint.

    Raises UserError (2) when there is none, or none that `prepare` may have written: it names no file outside the
    directory, and all that is read from it later is there and of its type.
    """
    path = directory / "meta.json"
    if not os.path.lexists(path):
        raise UserError(NONE_YET, str(directory))
    try:
        if not path.is_file() or path.stat().st_size > META_LIMIT:  # opening a pipe would wait for ever
            raise ValueError(f"not an ordinary file of at most {META_LIMIT:,} bytes")
        meta = json.loads(path.read_bytes())
        if isinstance(meta, dict) and meta.get("format") != FORMAT:
            written = escape(str(meta.get("format"))[:40])
            raise UserError(f"it is in format {written}, this program writes {FORMAT}", str(directory))
        names = _META.model_validate(meta, strict=True).files.keys()
        if (
            not all(map(may_contain, names))
            or not names >= TOKEN_FILES
            or not meta["splits"].keys() >= set(splits.NAMES)
        ):
            raise ValueError("other files than those of prepared data")
        if meta["fingerprint"] != fingerprint_of(meta):
            raise ValueError("fingerprint differs")
        return meta
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise token_files.damaged(path, " ".join([".".join(map(str, first["loc"])), first["msg"]])) from error


def may_contain(name: str) -> bool:
    """Whether a file in a prepared directory may have this name."""
    return name in TOKEN_FILES | OTHER_FILES or (name.endswith("_alpaca.jsonl") and Path(name).name == name)


def fingerprint_of(meta: dict[str, Any]) -> str:
    """The identity of the tokens: what makes them and no others."""
    identity = {name: meta[name] for name in ("tokenizer", "template")}
    identity["tokens"] = {name: file["sha256"] for name, file in meta["files"].items() if name in TOKEN_FILES}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def directory_of(cfg: DataConfig, root: Path) -> Path:
    return Path(os.path.realpath(root / Path(cfg.prepared_dir).expanduser()))


def settings_of(cfg: DataConfig) -> dict[str, Any]:
    how_written = {name: value for name in HOW_WRITTEN if (value := getattr(cfg, name)) is not None}
    return {name: getattr(cfg, name) for name in SETTINGS} | {"card": asdict(cfg.card)} | how_written


def why_unready(cfg: DataConfig, root: Path, directory: Path) -> str | None:
    """Why the prepared data cannot be used as it is; None when it can."""
    try:
        meta = read_meta(directory)
        for name, value in (dict.fromkeys(HOW_WRITTEN) | settings_of(cfg)).items():
            before = meta["settings"].get(name)
            if before != value:
                change = "" if isinstance(value, dict) else f" from {escape(str(before)[:80])} to {value}"
                return f"data.{name} changed{change}"
        token_files.check(directory, meta["files"])
    except UserError as error:
        return error.what
    source = sources.local(cfg, root)
    before = meta["source"]
    if source is None and "hub" in before:
        return None if before["hub"] == cfg.hub else f"data.hub changed from {escape(before['hub'])} to {cfg.hub}"
    if source is None:
        if cfg.path is None or Path(cfg.path).name not in [file["file"] for file in before["files"]]:
            return "it was made from another source"
        log.info(f"{sources.path_of(cfg, root)} has gone; using the data prepared from it in {directory}")
        return None
    if "hub" in before:
        return f"{source.label()} is there now"
    return None if source.identity() == before["files"] else f"{source.label()} changed"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one process prepares a directory at a time; the lock of a killed one is free."""
    lock = directory.with_name(directory.name + ".lock")
    with writing(directory):
        _refuse_other_files(directory)
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # a pipe is no reason to wait either
    with open(descriptor) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waiting for another process that prepares {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {directory}", error.strerror or str(error), "data.prepared_dir=<folder> chooses another",
            ENVIRONMENT,
        ) from error  # fmt: skip


def _refuse_other_files(directory: Path) -> None:
    """The directory is replaced as a whole: nobody's own files may be in it."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is a file", "data.prepared_dir", "choose a folder")
    for path in sorted(directory.iterdir()):
        if path.is_dir() or not (path.name == "meta.json" or may_contain(path.name)):
            raise UserError(
                f"{directory} has something in it that is not prepared data: {path.name}",
                "data.prepared_dir", "choose another folder, or empty this one",
            )  # fmt: skip
