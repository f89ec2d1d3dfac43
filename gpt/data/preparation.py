"""Raw files -> cleaned records -> splits -> JSONL and token files, in one directory that is complete or not there.

In it: the token files of gpt/data/token_files.py, the same records as JSON Lines, meta.json (settings, counts, sizes,
sha256), README.md (the data card) and token_lengths.png.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError, create_model

from gpt import tokenizer
from gpt.config.schema import DataConfig
from gpt.data import data_card, readers, records, sources, splits, text_files, token_files
from gpt.data.records import Record
from gpt.data.sources import Source
from gpt.errors import ENVIRONMENT, UserError
from gpt.terminal import figures
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

FORMAT = 1
# A change of one of these needs new files; the other keys of DataConfig are about batches.
SETTINGS = ("name", "kind", "columns", "tokenizer", "template", "max_tokens", "split", "val_fraction", "test_fraction",
            "split_seed", "on_bad_row", "card")  # fmt: skip
N_SHOWN = 10  # bad rows in the log; all of them are in bad_rows.txt
TOKEN_FILES = set(chain.from_iterable(map(token_files.names, splits.NAMES)))
OTHER_FILES = {"README.md", "token_lengths.png", "bad_rows.txt", *(f"{split}.jsonl" for split in splits.NAMES)}
META_LIMIT = 2**26  # bytes of meta.json, enough for 500,000 source files
NONE_YET = "no prepared data yet"
JSON, COLUMNS = json.JSONEncoder(ensure_ascii=False), ("instruction", "input", "output")  # of the lines of *.jsonl


def _record(name: str, **types: Any) -> Any:
    return create_model(name, **{key: (kind, ...) for key, kind in types.items()})


# What is read from meta.json again, with its types; the rest of it is for people.
_FILE, _SPLIT = _record("File", bytes=int, sha256=str), _record("Split", documents=int, tokens=int)
_SOURCE_FILE = _record("SourceFile", file=str, bytes=int, sha256=str)
_SOURCE = _record("Hub", hub=str, revision=str | None) | _record("Files", files=list[_SOURCE_FILE])
_META = _record("Meta", settings=dict[str, Any], source=_SOURCE, tokenizer=str, template=str, n_vocab=int,
                splits=dict[str, _SPLIT], files=dict[str, _FILE], fingerprint=str)  # fmt: skip


def ensure(cfg: DataConfig, root: Path) -> Path:
    """The directory of prepared data, prepared now if it is missing, incomplete, of other settings or of another
    source. Relative paths begin at `root`."""
    directory = _directory(cfg, root)
    if _why_unready(cfg, root, directory):
        with _locked(directory):
            if reason := _why_unready(cfg, root, directory):  # another start may have prepared it meanwhile
                _prepare(cfg, root, directory, reason)
    return directory


def find(cfg: DataConfig, root: Path) -> Path | None:
    """The directory of prepared data, None where `ensure` would prepare it. Writes nothing."""
    return None if _why_unready(cfg, root, _directory(cfg, root)) else _directory(cfg, root)


def prepare(cfg: DataConfig, root: Path) -> Path:
    """Prepares the data, whether or not it is there already. Returns the directory."""
    directory = _directory(cfg, root)
    with _locked(directory):
        _prepare(cfg, root, directory)
    return directory


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
        if not all(map(_is_ours, names)) or not names >= TOKEN_FILES or not meta["splits"].keys() >= set(splits.NAMES):
            raise ValueError("other files than those of prepared data")
        if meta["fingerprint"] != _fingerprint(meta):
            raise ValueError("fingerprint differs")
        return meta
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise token_files.damaged(path, " ".join([".".join(map(str, first["loc"])), first["msg"]])) from error


def _is_ours(name: str) -> bool:
    """Whether a file in a prepared directory may have this name."""
    return name in TOKEN_FILES | OTHER_FILES or (name.endswith("_alpaca.jsonl") and Path(name).name == name)


def _fingerprint(meta: dict[str, Any]) -> str:
    """What makes these tokens and no others."""
    identity = {name: meta[name] for name in ("tokenizer", "template")}
    identity["tokens"] = {name: file["sha256"] for name, file in meta["files"].items() if name in TOKEN_FILES}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _directory(cfg: DataConfig, root: Path) -> Path:
    return Path(os.path.realpath(root / Path(cfg.prepared_dir).expanduser()))


def _settings(cfg: DataConfig) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in SETTINGS} | {"card": asdict(cfg.card)}


def _why_unready(cfg: DataConfig, root: Path, directory: Path) -> str | None:
    """Why the prepared data cannot be used as it is; None when it can."""
    try:
        meta = read_meta(directory)
        for name, value in _settings(cfg).items():
            before = meta["settings"].get(name)
            if before != value:
                told = "" if isinstance(value, dict) else f" from {escape(str(before)[:80])} to {value}"
                return f"data.{name} changed{told}"
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
def _locked(directory: Path) -> Iterator[None]:
    """Only one process prepares a directory at a time; the lock of a killed one is free."""
    lock = directory.with_name(directory.name + ".lock")
    with _writing(directory):
        _refuse_others_files(directory)
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
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {directory}", error.strerror or str(error), "data.prepared_dir=<folder> chooses another",
            ENVIRONMENT,
        ) from error  # fmt: skip


def _refuse_others_files(directory: Path) -> None:
    """The directory is replaced as a whole: nobody's own files may be in it."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is a file", "data.prepared_dir", "choose a folder")
    for path in sorted(directory.iterdir()):
        if path.is_dir() or not (path.name == "meta.json" or _is_ours(path.name)):
            raise UserError(
                f"{directory} has something in it that is not prepared data: {path.name}",
                "data.prepared_dir", "choose another folder, or empty this one",
            )  # fmt: skip


def _prepare(cfg: DataConfig, root: Path, directory: Path, reason: str = "") -> None:
    """Writes everything to a temporary sibling and puts it into place with a rename."""
    try:
        source = sources.find(cfg, root)
    except UserError as error:
        if reason in ("", NONE_YET):
            raise
        what = f"{reason} in {directory}, and it cannot be prepared again: {error.what}"
        raise UserError(what, error.where, error.remedy, error.code) from error
    log.info(f"preparing data={cfg.name} from {source.label()}" + (f": {reason}" if reason else ""))
    new, old = (directory.with_name(f".{directory.name}.{state}") for state in ("new", "old"))
    with _writing(directory):
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            meta = {"format": FORMAT, "name": cfg.name, "kind": cfg.kind, "settings": _settings(cfg)}
            meta |= {"tokenizer": cfg.tokenizer, "n_vocab": tokenizer.load(cfg.tokenizer).n_vocab}
            write = _write_texts if cfg.kind == "text" else _write_records
            meta |= {"template": cfg.template} | write(cfg, source, new)
            _finish(meta, new)
            if directory.exists():
                os.rename(directory, old)
            os.rename(new, directory)
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)


def _finish(meta: dict[str, Any], directory: Path) -> None:
    """The card, then meta.json with the size and hash of every other file."""
    counts = ", ".join(f"{name} {split['documents']:,}" for name, split in meta["splits"].items())
    if not meta["splits"]["train"]["tokens"] or not meta["splits"]["val"]["tokens"]:
        raise UserError(
            f"a split is empty: {counts} documents",
            "data.val_fraction, data.test_fraction", "more data or other fractions are needed",
        )  # fmt: skip
    (directory / "README.md").write_text(data_card.data_card(meta), encoding="utf-8")
    known = meta.pop("sha256", {})  # of the files that were hashed while they were written
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sources.sha256(path)}
        for path in sorted(directory.iterdir())
    }
    meta["files"] = files
    meta["fingerprint"] = _fingerprint(meta)
    (directory / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_records(cfg: DataConfig, source: Source, directory: Path) -> dict[str, Any]:
    """Records of any kind; returns their part of meta.json."""
    bad = readers.BadRows(cfg.on_bad_row)
    if source.hub:
        revision, rows = sources.hub_rows(source)
        origin: dict[str, Any] = {"hub": source.hub, "revision": revision}
    else:
        rows = chain.from_iterable(readers.rows(path, bad) for path in source.files)
        origin = {"files": source.identity()}
    encoding = tokenizer.load(cfg.tokenizer)
    cleaned = records.Cleaned()
    lines: list[str] = []

    def read() -> Iterator[Record]:
        """What is done here is done while what was read before is being encoded."""
        for record in records.clean(rows, cfg, bad, cleaned):
            lines.append(JSON.encode({name: getattr(record, name) for name in COLUMNS}) + "\n")
            yield record
        import matplotlib.backends.backend_agg  # noqa: F401  0.5 s; the figure needs it

    ids = list(token_files.encode_records(read(), cfg.template, encoding))
    _report_bad_rows(bad, directory)
    end = np.array([encoding.eos], dtype=np.uint16)
    lengths = [len(prompt) + len(response) + 1 for prompt, response in ids]
    kept = [i for i, length in enumerate(lengths) if cfg.max_tokens is None or length <= cfg.max_tokens]
    ladder = list(cleaned.ladder)
    if cfg.max_tokens is not None:
        ladder.append((f"at most {cfg.max_tokens:,} tokens", len(kept)))
    if not kept:
        raise UserError(f"all {len(lengths):,} records are longer than data.max_tokens {cfg.max_tokens:,}")

    kept_records = [cleaned.records[i] for i in kept]
    parts = splits.split(kept_records, cfg)
    leaks = splits.leaks(kept_records, parts)
    _warn_of_leaks(cfg, leaks)
    _write_lines(directory / f"{cfg.name}_alpaca.jsonl", lines)
    counts = {}
    for name, chosen in parts.items():
        order = [kept[i] for i in chosen]
        if name != "train":  # its first documents shall be a fair sample of it
            random.Random(f"{cfg.split_seed} {name}").shuffle(order)
        _write_lines(directory / f"{name}.jsonl", [lines[i] for i in order])
        counts[name] = token_files.write(directory, name, [(*ids[i], end) for i in order], response=1)
    figures.length_histogram(lengths, cfg.max_tokens, directory / "token_lengths.png")
    return {
        "source": origin,
        "ladder": ladder,
        "splits": counts,
        "tokens_before_length_filter": sum(lengths),
        "lengths": {
            "document": data_card.percentiles(lengths),
            "response": data_card.percentiles([len(response) for _, response in ids]),
        },
        "leaks": leaks,
        "publisher_splits": sorted({record.split for record in kept_records if record.split}),
        "oddities": {"bad rows left out": len(bad.found), **records.oddities(cleaned)},
        "scores": records.score_statistics(cleaned.scores),
    }


def _report_bad_rows(bad: readers.BadRows, directory: Path) -> None:
    if bad.found:
        _write_lines(directory / "bad_rows.txt", [line + "\n" for line in bad.found])
        more = f", the first {N_SHOWN} are" if len(bad.found) > N_SHOWN else ""
        log.warning(f"{len(bad.found):,} bad rows left out, all listed in bad_rows.txt of the prepared data{more}:")
        for line in bad.found[:N_SHOWN]:
            log.warning(line)


def _warn_of_leaks(cfg: DataConfig, leaks: dict[str, dict[str, float]]) -> None:
    if cfg.split != "grouped":
        said = "; ".join(
            f"{100 * leak['question']:.1f} % of the {name} questions occur in train, "
            f"{100 * leak['focus']:.1f} % of the {name} rows share their focus with train"
            for name, leak in leaks.items()
        )
        log.warning(f"data.split={cfg.split}: {said}; data.split=grouped keeps them apart")


def _write_lines(path: Path, lines: list[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _write_texts(cfg: DataConfig, source: Source, directory: Path) -> dict[str, Any]:
    """Running text: cut by characters in the order of splits.IN_ORDER; files are joined by end of text. They are read
    twice, as their characters must be counted before they are cut, and never as a whole."""
    encoding = tokenizer.load(cfg.tokenizer)
    end = np.array([encoding.eos], dtype=np.uint16)
    measured = [text_files.measure(path) for path in source.files]
    n_chars = sum(n for n, _ in measured)
    parts = token_files.encode_files(source.files, measured, splits.of_text(n_chars, cfg), encoding)
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(token_files.Writer(directory, name)) for name in splits.IN_ORDER}
        for name, is_first, ids in parts:
            if is_first and writers[name].n_tokens:
                writers[name].add(end)
            writers[name].add(ids)
        counts = {name: writer.finish() for name, writer in writers.items()}
    n_tokens = sum(split["tokens"] for split in counts.values())
    return {
        "source": {"files": list(map(source.described, source.files, (sha256 for _, sha256 in measured)))},
        "ladder": [("files", len(measured)), ("characters", n_chars), ("tokens", n_tokens)],
        "splits": counts,
        "sha256": {writer.path.name: writer.sha256 for writer in writers.values()},
    }
