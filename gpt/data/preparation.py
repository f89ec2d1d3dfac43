"""Prepares data: raw files -> records -> splits -> JSONL and token files.

What is for people lies in data.prepared_dir: the records as JSON Lines, README.md (the data card), token_lengths.png.
What a run opens lies in a folder of its own there, complete or not there and never changed: the token files of
gpt/data/token_files.py and meta.json (settings, counts, sizes, sha256).
"""

import contextlib
import json
import logging
import random
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gpt import tokenizer
from gpt.config.data import DataConfig
from gpt.data import data_card, prepared, records, rows, sources, splits, text_files, token_files, topics
from gpt.data.columns import Wanted, listed
from gpt.data.prepared import Prepared
from gpt.data.records import Record
from gpt.data.sources import Source
from gpt.errors import UserError
from gpt.files import paths
from gpt.terminal import figures

log = logging.getLogger(__name__)

N_SHOWN = 10  # bad rows in the log; all of them are in bad_rows.txt
JSON, COLUMNS = json.JSONEncoder(ensure_ascii=False), ("instruction", "input", "output")  # of the lines of *.jsonl


def ensure(cfg: DataConfig, root: Path, is_typed: bool = False, fingerprint: str | None = None) -> Prepared:
    """The prepared data that a run opens, prepared now if it is missing, damaged, of other settings or of another
    source. Relative paths begin at `root`; for the other arguments see prepared.look_up."""
    data, _ = prepared.look_up(cfg, root, is_typed, fingerprint)
    if data is None:
        with prepared.locked(prepared.directory_of(cfg, root)):
            data, reason = prepared.look_up(cfg, root, is_typed, fingerprint)  # another start may have prepared it
            return data or _prepare(cfg, root, is_typed, reason)
    return data


def prepare(cfg: DataConfig, root: Path, is_typed: bool = False) -> Prepared:
    """Prepares the data, whether or not it is there already. Returns what a run opens."""
    with prepared.locked(prepared.directory_of(cfg, root)):
        return _prepare(cfg, root, is_typed)


def _prepare(cfg: DataConfig, root: Path, is_typed: bool, reason: str = "") -> Prepared:
    """Writes everything to a temporary sibling and puts it into place with renames."""
    directory = prepared.directory_of(cfg, root)
    try:
        source = sources.find(cfg, root, is_typed)
    except UserError as error:
        if reason in ("", prepared.NONE_YET):
            raise
        what = f"{reason} in {directory}, and it cannot be prepared again: {error.what}"
        raise UserError(what, error.where, error.remedy, error.code) from error
    log.info(f"preparing data={cfg.name} from {source.label()}" + (f": {reason}" if reason else ""))
    new, old = (directory.with_name(f".{directory.name}.{state}") for state in ("new", "old"))
    with prepared.writing(directory):
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            tokens = tokenizer.load(cfg.tokenizer)
            for name, content in tokens.files.items():
                (new / name).write_bytes(content)
            write = _write_texts if cfg.kind == "text" else _write_records
            meta = {
                "format": prepared.FORMAT,
                "name": cfg.name,
                "kind": cfg.kind,
                "settings": prepared.settings_of(cfg),
                "tokenizer": tokens.name,
                "n_vocab": tokens.n_vocab,
                "template": cfg.template,
                **write(cfg, source, new),
            }
            if "files" in meta["source"]:
                meta["source"]["path"] = paths.stored(cfg.path, root)
            _finish(meta, new)
            return prepared.opened(prepared.publish(new, directory, old))
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)


def _finish(meta: dict[str, Any], directory: Path) -> None:
    """meta.json with the size and hash of every file that a run opens, and the card."""
    counts = ", ".join(f"{name} {split['documents']:,}" for name, split in meta["splits"].items())
    if not meta["splits"]["train"]["tokens"] or not meta["splits"]["val"]["tokens"]:
        raise UserError(
            f"a split is empty: {counts} documents",
            "data.val_fraction, data.test_fraction", "more data or other fractions are needed",
        )  # fmt: skip
    meta["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sources.sha256(path)}
        for path in sorted(directory.iterdir())
        if path.name in prepared.RUN_FILES
    }
    meta["fingerprint"] = prepared.fingerprint_of(meta)
    (directory / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(data_card.data_card(meta), encoding="utf-8")


def _write_records(cfg: DataConfig, source: Source, directory: Path) -> dict[str, Any]:
    """Records of any kind; returns their part of meta.json."""
    bad, wanted = rows.BadRows(cfg.on_bad_row), Wanted(cfg.kind, cfg.columns, cfg.delimiter, cfg.encoding)
    if source.hub:
        revision, raw = sources.hub_rows(source)
        origin: dict[str, Any] = {"hub": source.hub, "revision": revision}
    else:
        raw = chain.from_iterable(rows.read(path, bad, wanted) for path in source.files)
        origin = {"files": source.identity()}
    encoding = tokenizer.load(cfg.tokenizer)
    cleaned = records.Cleaned()
    lines: list[str] = []

    def read() -> Iterator[Record]:
        """What is done here is done while what was read before is being encoded."""
        for record in records.clean(raw, cfg, bad, cleaned):
            lines.append(JSON.encode({name: getattr(record, name) for name in COLUMNS}) + "\n")
            yield record
        import matplotlib.backends.backend_agg  # noqa: F401  0.5 s; the figure needs it

    ids = list(token_files.encode_records(read(), cfg.template, encoding))
    _report_bad_rows(bad, directory)
    for line in records.describe_left_out(cleaned):
        log.info(line)
    end = np.array([encoding.eos], dtype=encoding.dtype)
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
    if missed := splits.missed_shares(kept_records, parts, cfg):
        log.warning(missed)
    _write_lines(directory / f"{cfg.name}_alpaca.jsonl", lines)
    counts: dict[str, dict[str, int]] = {}
    topic_of: dict[str, list[topics.Topic]] = {}
    for name, chosen in parts.items():
        order = [kept[i] for i in chosen]
        if name != "train":  # its first documents shall be a fair sample of it
            random.Random(f"{cfg.split_seed} {name}").shuffle(order)
        _write_lines(directory / f"{name}.jsonl", [lines[i] for i in order])
        with token_files.Writer(directory, name, encoding.dtype) as writer:
            for prompt, response in (ids[i] for i in order):
                writer.add(np.concatenate([prompt, response, end]))
                writer.end_document(len(prompt))
            counts[name] = writer.finish()
        topic_of[name] = [(cleaned.records[i].focus, cleaned.records[i].source) for i in order]
    topics.write(directory, topic_of)
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
        "oddities": {"bad rows left out": len(bad.left_out), **records.oddities(cleaned)},
        "scores": records.score_statistics(cleaned.scores),
    }


def _report_bad_rows(bad: rows.BadRows, directory: Path) -> None:
    if bad.left_out:
        _write_lines(directory / "bad_rows.txt", [line + "\n" for line in bad.left_out])
        more = f", the first {N_SHOWN} are" if len(bad.left_out) > N_SHOWN else ""
        log.warning(f"{len(bad.left_out):,} bad rows left out, all listed in bad_rows.txt of the prepared data{more}:")
        for line in bad.left_out[:N_SHOWN]:
            log.warning(line)


def _warn_of_leaks(cfg: DataConfig, leaks: dict[str, dict[str, float]]) -> None:
    if cfg.split != "grouped" and any(leak["question"] or leak.get("focus") for leak in leaks.values()):
        shares = "; ".join(f"{name}: {data_card.describe_leak(leak)}" for name, leak in leaks.items())
        log.warning(f"data.split={cfg.split}: {shares}; data.split=grouped keeps them apart")


def _write_lines(path: Path, lines: list[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _write_texts(cfg: DataConfig, source: Source, directory: Path) -> dict[str, Any]:
    """Running text: cut by characters in the order of splits.IN_ORDER; files are joined by end of text. They are read
    twice, as their characters must be counted before they are cut, and never as a whole."""
    encoding = tokenizer.load(cfg.tokenizer)
    end = np.array([encoding.eos], dtype=encoding.dtype)
    form = cfg.encoding, cfg.document_separator
    measured = [text_files.measure(path, *form) for path in source.files]
    n_chars, n_marks, n_separators = (sum(counts) for counts in list(zip(*measured, strict=True))[:3])
    if n_marks:
        mark = text_files.END_OF_TEXT
        log.warning(
            f'{mark} occurs {n_marks:,} times and is learned as text; data.document_separator="{mark}" cuts there'
        )
    if cfg.document_separator and not n_separators:
        log.warning(f"data.document_separator={json.dumps(cfg.document_separator)} occurs nowhere")
    if of_rows := [path.name for path in source.files if rows.suffix_of(path) in rows.FORMATS]:
        log.warning(f"{listed(of_rows)}: learned as text as it stands; data=alpaca reads rows")
    if source.left_out:
        log.warning(f"left out of {source.base}, as they do not end in .txt or .txt.gz: {listed(source.left_out)}")
    parts = token_files.encode_files(source.files, measured, splits.text_ranges(n_chars, cfg), encoding, *form)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(token_files.Writer(directory, name, encoding.dtype)) for name in splits.IN_ORDER
        }
        for name, is_first, ids in parts:
            if is_first and writers[name].n_tokens:
                writers[name].add(end)
            writers[name].add(ids)
        counts = {name: writer.finish() for name, writer in writers.items()}
    n_tokens = sum(split["tokens"] for split in counts.values())
    return {
        "source": {"files": list(map(source.described, source.files, (size.sha256 for size in measured)))},
        "ladder": [("files", len(measured)), *([("separators of documents", n_separators)] if n_separators else []),
                   ("characters", n_chars), ("tokens", n_tokens)],
        "splits": counts,
    }  # fmt: skip
