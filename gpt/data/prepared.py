"""Finds prepared data, reads its meta.json, and checks whether it is what a run needs.

A directory of prepared data shows what was prepared last. The token files of this and of all earlier preparations lie
in it in one folder for each, which is named by their fingerprint and not changed any more: a run opens that.
"""

import contextlib
import filecmp
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from filelock import lock_descriptor
from pydantic import ValidationError, create_model

from gpt import tokenizer
from gpt.config.data import DataConfig
from gpt.data import sources, splits, token_files, topics
from gpt.errors import ENVIRONMENT, UserError
from gpt.files import paths
from gpt.files.directory import missing, remove_unused
from gpt.files.json_file import read_object
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

FORMAT = 1
# A change of one of these needs new files; the other keys of DataConfig are about batches.
SETTINGS = ("name", "kind", "columns", "tokenizer", "template", "max_tokens", "split", "val_fraction", "test_fraction",
            "split_seed", "on_bad_row", "card")  # fmt: skip
HOW_WRITTEN = ("delimiter", "encoding", "document_separator")  # these, too; recorded where they are set
TOKEN_FILES = set(chain.from_iterable(map(token_files.names, splits.NAMES)))
# What a run opens; the other files are for people.
RUN_FILES = {*TOKEN_FILES, *tokenizer.FILES, "val.jsonl", "meta.json", topics.FILE}
SHOWN_FILES = {"README.md", "token_lengths.png", "bad_rows.txt", *(f"{split}.jsonl" for split in splits.NAMES)}
VERSION = re.compile("[0-9a-f]{12}")  # the name of a folder: the beginning of the fingerprint
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


@dataclass(frozen=True)
class Prepared:
    """Prepared data that a run has opened: what meta.json says counts to the end, the folder may be gone by then."""

    folder: Path
    meta: dict[str, Any]

    @property
    def tokens(self) -> tokenizer.Tokenizer:
        """What the data was prepared with. Raises UserError (3) where its files are not that."""
        return tokenizer.carried(self.meta["tokenizer"], self.folder)


def opened(folder: Path) -> Prepared:
    """The prepared data in a folder. Raises UserError, see `read_meta`."""
    return Prepared(folder, read_meta(folder))


def find(cfg: DataConfig, root: Path, is_typed: bool = False, fingerprint: str | None = None) -> Prepared | None:
    """The prepared data that a run opens, None where `ensure` would prepare it. See `look_up`."""
    return look_up(cfg, root, is_typed, fingerprint)[0]


def look_up(
    cfg: DataConfig, root: Path, is_typed: bool = False, fingerprint: str | None = None
) -> tuple[Prepared | None, str]:
    """Data that was prepared with these settings from this source, or None and why there is none.

    Where the raw files have gone, what was prepared from their whole path will do, unless that was typed (`is_typed`):
    then UserError (2) says that nothing is there. A run that goes on has its own data, known by its `fingerprint`.
    Writes nothing.
    """
    source = sources.local(cfg, root)
    if source is None and is_typed and cfg.path is not None:
        sources.find(cfg, root, is_typed)
    identity = functools.cache(source.identity) if source else None  # hashed once, and only where settings are right
    reasons = []
    its_own = (fingerprint or "")[:12]
    for version in sorted(versions(directory_of(cfg, root)), key=lambda folder: folder.name != its_own):
        try:
            data = opened(version)
            reason = _other_settings(cfg, data.meta["settings"])
            if not reason and source and identity:
                reason = _other_content(data.meta["source"], source.label(), identity)
            elif not reason and data.meta["fingerprint"] != fingerprint:
                reason = _other_source(cfg, root, data.meta["source"])
            if not reason:
                _check_files(version, data.meta)
                if source is None and "hub" not in data.meta["source"]:
                    log.info(f"{sources.path_of(cfg, root)} has gone; using the data prepared from it in {version}")
                return data, ""
        except UserError as error:
            reason = error.what
        reasons.append(reason)
    # Of data with the right settings there is more to say than of others.
    return None, next((text for text in reasons if not text.startswith("data.")), (reasons or [NONE_YET])[0])


def _other_settings(cfg: DataConfig, before: dict[str, Any]) -> str | None:
    """The first setting that has changed, None when all are as before."""
    for name, value in (dict.fromkeys(HOW_WRITTEN) | settings_of(cfg)).items():
        if (was := before.get(name)) != value:
            change = "" if isinstance(value, dict) else f" from {escape(str(was)[:80])} to {value}"
            return f"data.{name} changed{change}"
    return None


def _other_content(before: dict[str, Any], label: str, identity: Callable[[], list[dict[str, Any]]]) -> str | None:
    """How the raw files, which are there, differ from those that data was prepared from."""
    if "hub" in before:
        return f"{label} is there now"
    return None if identity() == before["files"] else f"{label} changed"


def _other_source(cfg: DataConfig, root: Path, before: dict[str, Any]) -> str | None:
    """How the source, of which no file is there, differs from that which data was prepared from."""
    if "hub" in before:
        return None if before["hub"] == cfg.hub else f"data.hub changed from {escape(before['hub'])} to {cfg.hub}"
    if cfg.path is None:
        return "it was made from another source"
    if "path" in before:
        is_same = before["path"] == paths.stored(cfg.path, root)
    else:  # older versions of this program recorded the names of the files only
        is_same = Path(cfg.path).name in [file["file"] for file in before["files"]]
    return None if is_same else "it was made from another source"


def versions(directory: Path) -> list[Path]:
    """The folders of token files, the newest first. In a directory as older versions of this program have left it, the
    files lie in the directory itself."""
    newest = (_mark(directory) or "")[:12]  # no clock is asked for what it can tell
    folders = [path for path in directory.glob("*") if VERSION.fullmatch(path.name) and not path.is_symlink()]
    folders.sort(key=lambda path: (path.name == newest, path.stat().st_mtime_ns), reverse=True)
    return [path for path in folders if path.is_dir()] + [directory] * _has_older_layout(directory)


def _has_older_layout(directory: Path) -> bool:
    return any(os.path.lexists(directory / name) for name in TOKEN_FILES)


def with_fingerprint(directory: Path, fingerprint: str, known: token_files.Seen | None = None) -> Prepared:
    """The preparation in `directory` that a run was trained on; files that another rank has hashed (`known`) are not
    read. Raises UserError (2) where it is not there any more."""
    for version in versions(directory):
        with contextlib.suppress(UserError):
            data = opened(version)
            if data.meta["fingerprint"] == fingerprint:
                _check_files(version, data.meta, known)
                return data
    what = f"the data that the run was trained on is not there: fingerprint {escape(fingerprint[:12])}"
    raise UserError(what, str(directory), "prepare it again with prepare_data.py, or give data=... or file=...")


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
        if not (all(map(may_contain, names)) and names >= TOKEN_FILES and meta["splits"].keys() >= set(splits.NAMES)):
            raise ValueError("other files than those of prepared data")
        if meta["fingerprint"] != fingerprint_of(meta):
            raise ValueError("fingerprint differs")
        return meta
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise token_files.damaged(path, " ".join([".".join(map(str, first["loc"])), first["msg"]])) from error


def may_contain(name: str) -> bool:
    """Whether a file in a prepared directory may have this name."""
    is_alpaca = name.endswith("_alpaca.jsonl") and Path(name).name == name
    return is_alpaca or name in TOKEN_FILES | tokenizer.FILES | SHOWN_FILES | {topics.FILE}


def fingerprint_of(meta: dict[str, Any]) -> str:
    """The identity of the tokens: what makes them and no others."""
    identity = {name: meta[name] for name in ("tokenizer", "template")}
    identity["tokens"] = {name: file["sha256"] for name, file in meta["files"].items() if name in TOKEN_FILES}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def directory_of(cfg: DataConfig, root: Path) -> Path:
    return Path(os.path.realpath(root / Path(cfg.prepared_dir).expanduser()))


def settings_of(cfg: DataConfig) -> dict[str, Any]:
    how_written = {name: value for name in HOW_WRITTEN if (value := getattr(cfg, name)) is not None}
    card = {name: text for name, text in asdict(cfg.card).items() if name != "notice"}  # which is of models
    content = {"tokenizer": tokenizer.load(cfg.tokenizer).name, "card": card}  # wherever the tokenizer's files are
    return {name: getattr(cfg, name) for name in SETTINGS} | content | how_written


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one process prepares a directory at a time; the lock of a killed one is free. Afterwards the lock is gone,
    and so are the folders that a refused preparation has made."""
    lock, made = directory.with_name(directory.name + ".lock"), missing(directory.parent)
    with writing(directory):
        _refuse_other_files(directory)
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(lock)
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no file that is open: there it stays
                lock.unlink()
            remove_unused(made)


def _lock(path: Path) -> TextIO:
    """The lock file, held. A process that was waiting for it may have got the lock of a file that is gone by then."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # a pipe is no reason to wait either
        file = open(descriptor)  # noqa: SIM115, open as long as the lock is held
        if not lock_descriptor(descriptor, blocking=False):
            log.info(f"waiting for another process that prepares {path.with_suffix('')}")
            lock_descriptor(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return file
        file.close()


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
    """Raises UserError for a directory with somebody's own files in it: not empty, and not one of prepared data."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is a file", "data.prepared_dir", "choose a folder")
    names = sorted(os.listdir(directory))
    if names and not versions(directory) and not _mark(directory):
        what = f"{directory} has something in it that is not prepared data: {escape(names[0])}"
        raise UserError(what, "data.prepared_dir", "choose another folder, or empty this one")


def _mark(directory: Path) -> str | None:
    """The fingerprint of what was prepared last, in meta.json: the first file in a directory of prepared data."""
    with contextlib.suppress(OSError, ValueError):
        fingerprint = read_object(directory / "meta.json", META_LIMIT).get("fingerprint")
        return fingerprint if isinstance(fingerprint, str) else None
    return None


def publish(new: Path, directory: Path, aside: Path) -> Path:
    """Puts data that was prepared in `new` into its place: what is for people in `directory`, what a run opens in a
    folder of its own there, which is returned. Nothing that a run may have opened is written to."""
    directory.mkdir(exist_ok=True)
    meta = read_meta(new)
    _move_older_layout(directory, aside)
    shutil.copyfile(new / "meta.json", new / "mark")
    os.replace(new / "mark", directory / "meta.json")
    for name in SHOWN_FILES & RUN_FILES & set(os.listdir(new)):
        shutil.copyfile(new / name, new / f"{name}.shown")
    shown = {path.name.removesuffix(".shown"): path for path in new.iterdir() if path.name not in RUN_FILES}
    if changed := [name for name, path in shown.items() if not _is_same(path, directory / name)]:
        for name in {"README.md"} | SHOWN_FILES - shown.keys():  # without its card, it is not complete
            (directory / name).unlink(missing_ok=True)
        for name in sorted(changed, key="README.md".__eq__):  # the card last
            os.replace(shown.pop(name), directory / name)
    for path in shown.values():
        path.unlink()
    return _publish_version(new, directory / meta["fingerprint"][:12], aside)


def _publish_version(new: Path, version: Path, aside: Path) -> Path:
    """Renames `new` to `version`. Where the same tokens are there already, only what is said about them is replaced."""
    try:
        _check_files(version, read_meta(version))
    except UserError:
        if os.path.lexists(version):
            os.rename(version, aside)
        os.rename(new, version)
        return version
    for name in sorted(RUN_FILES - TOKEN_FILES, reverse=True):  # meta.json last
        if (new / name).exists() and not _is_same(new / name, version / name):
            os.replace(new / name, version / name)
    return version


def _check_files(directory: Path, meta: dict[str, Any], known: token_files.Seen | None = None) -> None:
    """Raises UserError for what a run opens and is not as it was written. Older versions of this program listed the
    files for people as well."""
    token_files.check(directory, {name: file for name, file in meta["files"].items() if name in RUN_FILES}, known)


def _move_older_layout(directory: Path, aside: Path) -> None:
    """Gives the token files of an older version of this program, which lie in the directory itself, their folder."""
    if not _has_older_layout(directory):
        return
    with contextlib.suppress(UserError):  # damaged: nobody can use them
        meta = read_meta(directory)
        _check_files(directory, meta)
        aside.mkdir()
        for name in RUN_FILES & {*meta["files"], "meta.json"}:
            shutil.copyfile(directory / name, aside / name)
        if not (directory / meta["fingerprint"][:12]).exists():
            os.rename(aside, directory / meta["fingerprint"][:12])
        shutil.rmtree(aside, ignore_errors=True)
    for name in TOKEN_FILES:
        (directory / name).unlink(missing_ok=True)


def _is_same(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)
