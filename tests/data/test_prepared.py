"""A directory of prepared data is used as it is, or prepared again and said why."""

import json
import os

import pytest
from conftest import data_config
from test_preparation import contents, sample, small_csv, small_text

from gpt.data import preparation, prepared
from gpt.errors import UserError


def test_a_prepared_directory_says_what_it_is(tmp_path):
    directory = preparation.prepare(sample(), tmp_path)
    meta = prepared.read_meta(directory)
    assert meta["files"].keys() == {path.name for path in directory.iterdir()} - {"meta.json"}
    assert {"README.md", "token_lengths.png", "sample_alpaca.jsonl", "train.bin", "val.index.npy"} < meta[
        "files"
    ].keys()
    assert len(meta["fingerprint"]) == 64 and meta["n_vocab"] == 257
    assert str(tmp_path) not in (directory / "meta.json").read_text() + (directory / "README.md").read_text()


def test_what_is_prepared_is_used_and_batches_may_change(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    preparation.ensure(cfg, tmp_path)
    assert lines() == ["preparing data=small from small.csv: no prepared data yet"]
    for change in ({"mask": "all"}, {"batching": "padded"}, {"overflow": "drop"}, {"prompts": ["x"]}):
        preparation.ensure(data_config(**{**vars(cfg), **change}), tmp_path)
    assert len(lines()) == 1


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"max_tokens": 500}, "data.max_tokens changed from None to 500"),
        ({"split": "random"}, "data.split changed from grouped to random"),
        ({"split_seed": 3}, "data.split_seed changed from 0 to 3"),
        ({"card": {"title": "t", "description": "d", "license": "other", "citation": "c"}}, "data.card changed"),
    ],
)
def test_other_settings_prepare_anew(tmp_path, lines, change, reason):
    cfg = small_csv(tmp_path / "small.csv")
    preparation.ensure(cfg, tmp_path)
    preparation.ensure(data_config(**{**vars(cfg), **change}), tmp_path)
    assert lines()[1] == f"preparing data=small from small.csv: {reason}"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_meta(directory, **changes):
    meta = json.loads((directory / "meta.json").read_text()) | changes
    (directory / "meta.json").write_text(json.dumps(meta))


def replace_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {  # what is done to a prepared directory, and what is said about it
    "train.bin damaged (10 bytes, not ": lambda d: os.truncate(d / "train.bin", 10),
    "train.bin damaged (sha256 differs)": lambda d: flip_a_bit(d / "train.bin"),
    "test.bin damaged (sha256 differs)": lambda d: flip_a_bit(d / "test.bin"),
    "val.index.npy damaged (sha256 differs)": lambda d: flip_a_bit(d / "val.index.npy"),
    "val.index.npy damaged (not an ordinary file)": lambda d: replace_by_a_pipe(d / "val.index.npy"),
    "README.md damaged (missing)": lambda d: (d / "README.md").unlink(),
    "no prepared data yet": lambda d: (d / "meta.json").unlink(),
    "meta.json damaged (Expecting property name": lambda d: os.truncate(d / "meta.json", 1),
    "meta.json damaged (maximum recursion depth": lambda d: (d / "meta.json").write_text("[" * 100_000),
    "meta.json damaged (Input should be a valid dictionary": lambda d: (d / "meta.json").write_text("[]"),
    "meta.json damaged ('utf-": lambda d: (d / "meta.json").write_bytes(b"\x80\x04pickle"),
    "meta.json damaged (not an ordinary file of at most": lambda d: os.truncate(d / "meta.json", 2**40),
    "meta.json damaged (not an ordinary file of": lambda d: replace_by_a_pipe(d / "meta.json"),
    "meta.json damaged (files.train.bin.bytes Field required": lambda d: edit_meta(d, files={"train.bin": {}}),
    "meta.json damaged (fingerprint differs)": lambda d: edit_meta(d, fingerprint="0" * 64),
    "meta.json damaged (splits.val.tokens Input should": lambda d: edit_meta(
        d, splits={"val": {"documents": 1, "tokens": "many"}}
    ),
    "it is in format 7\\x1b[2J\\n, this program writes 1": lambda d: edit_meta(d, format="7\x1b[2J\n"),
    "data.split changed from random\\x1b\\n to sequential": lambda d: edit_meta(
        d, settings=prepared.read_meta(d)["settings"] | {"split": "random\x1b\n"}
    ),
}


@pytest.mark.parametrize("reason, damage", DAMAGE.items(), ids=[ascii(reason)[:60] for reason in DAMAGE])
def test_damaged_data_is_prepared_again_from_its_source_with_the_reason(tmp_path, lines, reason, damage):
    cfg = small_text(tmp_path / "small.txt")
    directory = preparation.ensure(cfg, tmp_path)
    whole = contents(directory)
    damage(directory)
    preparation.ensure(cfg, tmp_path)
    assert lines()[1].startswith(f"preparing data=small from small.txt: {reason}") and len(lines()) == 2
    assert contents(directory) == whole


@pytest.mark.parametrize("damage", [DAMAGE["train.bin damaged (sha256 differs)"], DAMAGE["no prepared data yet"]])
def test_damaged_data_without_its_source_is_an_error_and_stays_what_it_is(tmp_path, damage):
    cfg = small_text(tmp_path / "small.txt")
    directory = preparation.ensure(cfg, tmp_path)
    (tmp_path / "small.txt").unlink()
    damage(directory)
    before = contents(directory)
    with pytest.raises(UserError, match=r"no text file at .*small\.txt") as caught:
        preparation.ensure(cfg, tmp_path)
    assert caught.value.code == 2 and contents(directory) == before
    if "meta.json" in before:
        assert str(caught.value).startswith(f"train.bin damaged (sha256 differs) in {directory}, and it cannot be")


HOSTILE_NAMES = ["../../x", "/etc/passwd", "a\0", "\x1b[2J", "../x_alpaca.jsonl", "x" * 300, "meta.json"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_file_outside_the_directory_is_looked_at_whatever_meta_json_lists(tmp_path, lines, name):
    cfg = small_text(tmp_path / "small.txt")
    directory = preparation.ensure(cfg, tmp_path)
    edit_meta(directory, files=prepared.read_meta(directory)["files"] | {name: {"bytes": 0, "sha256": ""}})
    preparation.ensure(cfg, tmp_path)
    reason = "meta.json damaged (other files than those of prepared data)"
    assert lines()[1:] == [f"preparing data=small from small.txt: {reason}"]


def test_a_pipe_in_place_of_the_lock_stops_nobody(tmp_path):
    os.mkfifo(tmp_path / "prepared.lock")
    assert preparation.prepare(small_text(tmp_path / "small.txt"), tmp_path).is_dir()


def test_a_changed_source_prepares_anew_and_a_vanished_one_does_not(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    directory = preparation.ensure(cfg, tmp_path)
    before = prepared.read_meta(directory)["fingerprint"]
    small_csv(tmp_path / "small.csv", n_topics=21)
    preparation.ensure(cfg, tmp_path)
    assert lines()[1] == "preparing data=small from small.csv: small.csv changed"
    assert prepared.read_meta(directory)["fingerprint"] != before
    (tmp_path / "small.csv").unlink()
    assert preparation.ensure(cfg, tmp_path) == directory
    assert lines()[2].startswith(f"{tmp_path}/small.csv has gone; using the data prepared from it")
