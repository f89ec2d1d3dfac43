"""A directory of prepared data is used as it is, or prepared again and said why."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import data_config
from test_preparation import contents, sample, small_csv, small_text

from gpt.data import batching, preparation, prepared
from gpt.errors import UserError


def test_prepared_data_says_what_it_is_to_people_and_lies_in_a_folder_of_its_own_for_runs(tmp_path):
    folder = preparation.prepare(sample(), tmp_path).folder
    meta = prepared.read_meta(folder)
    assert meta["files"].keys() == {path.name for path in folder.iterdir()} - {"meta.json"}
    assert {"train.bin", "val.index.npy", "val.jsonl"} < meta["files"].keys()
    assert len(meta["fingerprint"]) == 64 and meta["n_vocab"] == 257
    assert {path.name for path in folder.parent.iterdir()} == {
        "README.md", "meta.json", "sample_alpaca.jsonl", "test.jsonl", "token_lengths.png", "train.jsonl", "val.jsonl",
        meta["fingerprint"][:12],
    }  # fmt: skip
    card = (folder.parent / "README.md").read_text()
    assert f"token files `{folder.name}/`" in card and str(tmp_path) not in (folder / "meta.json").read_text() + card


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
        (
            {"card": {"title": "t", "description": "d", "license": "other", "citation": "c", "notice": None}},
            "data.card changed",
        ),
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
    "test.bin damaged (missing)": lambda d: (d / "test.bin").unlink(),
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
    directory = preparation.ensure(cfg, tmp_path).folder
    whole = contents(directory)
    damage(directory)
    preparation.ensure(cfg, tmp_path)
    assert lines()[1].startswith(f"preparing data=small from small.txt: {reason}") and len(lines()) == 2
    assert contents(directory) == whole


@pytest.mark.parametrize("damage", [DAMAGE["train.bin damaged (sha256 differs)"], DAMAGE["no prepared data yet"]])
def test_damaged_data_without_its_source_is_an_error_and_stays_what_it_is(tmp_path, damage):
    cfg = small_text(tmp_path / "small.txt")
    directory = preparation.ensure(cfg, tmp_path).folder
    (tmp_path / "small.txt").unlink()
    damage(directory)
    before = contents(directory)
    with pytest.raises(UserError, match=r"no text file at .*small\.txt") as caught:
        preparation.ensure(cfg, tmp_path)
    assert caught.value.code == 2 and contents(directory) == before
    if "meta.json" in before:
        assert str(caught.value).startswith(
            f"train.bin damaged (sha256 differs) in {directory.parent}, and it cannot be"
        )


HOSTILE_NAMES = ["../../x", "/etc/passwd", "a\0", "\x1b[2J", "../x_alpaca.jsonl", "x" * 300, "meta.json"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_file_outside_the_directory_is_looked_at_whatever_meta_json_lists(tmp_path, lines, name):
    cfg = small_text(tmp_path / "small.txt")
    directory = preparation.ensure(cfg, tmp_path).folder
    edit_meta(directory, files=prepared.read_meta(directory)["files"] | {name: {"bytes": 0, "sha256": ""}})
    preparation.ensure(cfg, tmp_path)
    reason = "meta.json damaged (other files than those of prepared data)"
    assert lines()[1:] == [f"preparing data=small from small.txt: {reason}"]


def test_a_pipe_in_place_of_the_lock_stops_nobody(tmp_path):
    os.mkfifo(tmp_path / "prepared.lock")
    assert preparation.prepare(small_text(tmp_path / "small.txt"), tmp_path).folder.is_dir()


def test_a_changed_source_prepares_anew_and_a_vanished_one_does_not(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    before = preparation.ensure(cfg, tmp_path).folder
    small_csv(tmp_path / "small.csv", n_topics=21)
    after = preparation.ensure(cfg, tmp_path).folder
    assert lines()[1] == "preparing data=small from small.csv: small.csv changed"
    assert after != before and contents(before).keys() == contents(after).keys()
    (tmp_path / "small.csv").unlink()
    assert preparation.ensure(cfg, tmp_path).folder == after
    assert lines()[2].startswith(f"{tmp_path}/small.csv has gone; using the data prepared from it")


def test_several_settings_of_one_directory_lie_side_by_side_and_none_is_prepared_twice(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    other = data_config(**{**vars(cfg), "split_seed": 1})
    folders = [preparation.ensure(each, tmp_path).folder for each in (cfg, other)]
    whole = contents(tmp_path)
    assert [preparation.ensure(each, tmp_path).folder for each in (cfg, other)] == folders and len({*folders}) == 2
    assert [line.partition(": ")[2] for line in lines()] == [
        "no prepared data yet", "data.split_seed changed from 0 to 1"
    ]  # fmt: skip
    assert contents(tmp_path) == whole
    tokens = [contents(folder) for folder in folders]
    assert (tmp_path / "prepared" / "val.jsonl").read_bytes() == tokens[1]["val.jsonl"]  # the newest
    preparation.prepare(cfg, tmp_path)
    assert (tmp_path / "prepared" / "val.jsonl").read_bytes() == tokens[0]["val.jsonl"]
    assert [contents(folder) for folder in folders] == tokens


def test_what_a_run_has_opened_is_not_written_to_when_it_is_prepared_again_or_removed(tmp_path):
    cfg = small_text(tmp_path / "small.txt")
    folder = preparation.ensure(cfg, tmp_path).folder
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    split = batching.Split.open(folder, "train")
    ids = split.ids.tolist()
    preparation.prepare(cfg, tmp_path)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    preparation.prepare(replace(cfg, card=replace(cfg.card, title="x")), tmp_path)
    assert {path.name for path in folder.iterdir() if path.stat().st_ino != before[path.name]} == {"meta.json"}
    shutil.rmtree(folder.parent)
    assert split.ids.tolist() == ids


def to_older_layout(folder):
    """As versions before this one have left it: all in one directory, and no path of the source."""
    meta = prepared.read_meta(folder)
    del meta["source"]["path"]
    for path in list(folder.iterdir()):
        path.rename(folder.parent / path.name)
    folder.rmdir()
    facts = {path.name: {"bytes": path.stat().st_size, "sha256": "unused"} for path in folder.parent.iterdir()}
    meta["files"] = facts | meta["files"]
    del meta["files"]["meta.json"]
    (folder.parent / "meta.json").write_text(json.dumps(meta))


def test_data_that_an_older_version_has_prepared_is_used_where_it_is_and_kept_when_more_is_prepared(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    folder = preparation.ensure(cfg, tmp_path).folder
    tokens = contents(folder)
    to_older_layout(folder)
    assert preparation.ensure(cfg, tmp_path).folder == folder.parent and len(lines()) == 1
    preparation.ensure(data_config(**{**vars(cfg), "split_seed": 1}), tmp_path)
    assert preparation.ensure(cfg, tmp_path).folder == folder and len(lines()) == 2
    assert {name: tokens[name] for name in prepared.TOKEN_FILES}.items() <= contents(folder).items()
    assert not any((folder.parent / name).exists() for name in prepared.TOKEN_FILES)
    (tmp_path / "small.csv").unlink()  # of which they recorded the name only
    assert preparation.ensure(cfg, tmp_path).folder == folder


@pytest.mark.parametrize("kind", ["csv", "text"])
def test_another_path_with_the_same_file_name_is_never_answered_with_older_data(tmp_path, kind):
    make = small_csv if kind == "csv" else small_text
    (tmp_path / "a").mkdir()
    cfg = replace(make(tmp_path / "a" / "story.txt"), path="a/story.txt")
    folder = preparation.ensure(cfg, tmp_path, is_typed=True).folder
    (tmp_path / "a" / "story.txt").rename(tmp_path / "b.txt")
    assert preparation.ensure(cfg, tmp_path).folder == folder  # it stands in YAML: of this whole path
    for path in ("story.txt", "b/story.txt", str(tmp_path.parent / "story.txt"), "a/../story.txt"):
        with pytest.raises(UserError, match=r"made from another source .*story\.txt") as caught:
            preparation.ensure(replace(cfg, path=path), tmp_path)
        assert caught.value.code == 2
    with pytest.raises(UserError, match=r"^(no text file at )?.*a/story\.txt") as caught:
        preparation.ensure(cfg, tmp_path, is_typed=True)
    assert caught.value.code == 2
    own = prepared.read_meta(folder)["fingerprint"]
    assert preparation.ensure(cfg, tmp_path, fingerprint=own).folder == folder  # a run that goes on


def test_a_run_goes_on_with_its_own_data_also_where_the_same_path_was_prepared_again_since(tmp_path):
    cfg = small_text(tmp_path / "small.txt")
    own = preparation.ensure(cfg, tmp_path)
    (tmp_path / "small.txt").write_text("All play and no work.\n" * 20)
    newest = preparation.ensure(cfg, tmp_path)
    (tmp_path / "small.txt").unlink()
    assert preparation.ensure(cfg, tmp_path) == newest != own
    assert preparation.ensure(cfg, tmp_path, fingerprint=own.meta["fingerprint"]) == own


def test_the_hub_is_no_answer_to_a_path_that_is_typed(tmp_path):
    cfg = data_config(path="medquad.csv", hub="lavita/MedQuAD", prepared_dir="prepared")
    for attempt in (preparation.ensure, preparation.prepare):
        with pytest.raises(UserError, match=r"medquad\.csv does not exist"):
            attempt(cfg, tmp_path, is_typed=True)


FOREIGN = [{"README.md": "mine"}, {"meta.json": "[]"}, {"meta.json": "{}", "train.jsonl": "{}"}, {"test.jsonl": "{}"}]


@pytest.mark.parametrize("files", FOREIGN, ids=str)
def test_a_folder_with_somebodys_files_is_refused_also_if_prepared_data_has_such_names(tmp_path, files):
    cfg = small_text(tmp_path / "small.txt")
    (tmp_path / "prepared").mkdir()
    for name, text in files.items():
        (tmp_path / "prepared" / name).write_text(text)
    with pytest.raises(UserError, match="has something in it that is not prepared data"):
        preparation.prepare(cfg, tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "prepared").iterdir()} == files
