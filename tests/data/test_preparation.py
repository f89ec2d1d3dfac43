"""Raw files become one complete directory, the same bytes each time, and nothing is prepared twice or half."""

import csv
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from conftest import REAL_MEDQUAD, ROOT, THE_VERDICT, data_config
from filelock import lock_descriptor
from test_tokenizer import made_texts

from gpt import tokenizer
from gpt.data import preparation, prepared, splits, text_files, token_files
from gpt.errors import UserError
from gpt.prompts import format_prompt

SAMPLE = {"name": "sample", "path": str(ROOT / "gpt" / "sample.csv"), "prepared_dir": "data/sample"}


def sample(**changes):
    return data_config(**{**SAMPLE, "max_tokens": 1024, "val_fraction": 0.1, "test_fraction": 0.05, **changes})


def small_csv(path, n_topics=20):
    rows = [f"What is topic {i} ?,It is number {i}.,src,topic {i}" for i in range(n_topics)]
    path.write_text("\n".join(["question,answer,source,focus_area", *rows]) + "\n")
    return data_config(name="small", path=path.name, prepared_dir="prepared")


def small_text(path):
    """Data that is prepared in milliseconds: it has no figure."""
    path.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    return data_config(name="small", kind="text", path=path.name, prepared_dir="prepared")


def contents(directory):
    """Of all files in a directory and below, by their names."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problem(cfg, root, code):
    with pytest.raises(UserError) as caught:
        preparation.prepare(cfg, root)
    assert caught.value.code == code
    return str(caught.value)


@pytest.fixture(scope="module")
def medquad(tmp_path_factory):
    """The directory prepared from the real medquad.csv, as conf/data/medquad.yaml says."""
    if not REAL_MEDQUAD.exists():
        pytest.skip(f"{REAL_MEDQUAD} is not there")
    root = tmp_path_factory.mktemp("medquad")
    return preparation.prepare(real_config(), root).folder


def real_config():
    return data_config(
        name="medquad", path=str(REAL_MEDQUAD), prepared_dir="medquad", tokenizer="gpt2", max_tokens=1024,
        val_fraction=0.05, test_fraction=0.1,
    )  # fmt: skip


def test_the_ladder_on_the_real_medquad(medquad):
    meta = prepared.read_meta(medquad)
    assert meta["ladder"] == [
        ["rows", 16_412], ["with an answer", 16_407], ["without exact duplicates", 16_359],
        ["at most 1,024 tokens", 15_941],
    ]  # fmt: skip
    assert meta["tokens_before_length_filter"] == 5_070_428
    assert meta["oddities"]["rows without a focus area"] == 14
    assert meta["oddities"]["questions with several answers"] == 875
    assert meta["oddities"]["times the most frequent answer occurs"] == 348
    assert sum(split["documents"] for split in meta["splits"].values()) == 15_941


def test_no_question_and_no_focus_area_of_the_real_medquad_is_in_two_splits(medquad):
    """Judged from the files: the focus of a record is looked up in the raw CSV by its question and answer."""
    with open(REAL_MEDQUAD, encoding="utf-8", newline="") as file:
        focus_of = {
            (" ".join(row["question"].split()), " ".join(row["answer"].split())): row["focus_area"].casefold().strip()
            for row in csv.DictReader(file)
        }
    questions, focuses = {}, {}
    for split in ("train", "val", "test"):
        rows = read_lines(medquad.parent / f"{split}.jsonl")
        assert all(set(row) == {"instruction", "input", "output"} for row in rows)
        questions[split] = {row["instruction"].casefold() for row in rows}
        focuses[split] = {focus_of[row["instruction"], row["output"]] for row in rows} - {""}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not questions[a] & questions[b]
        assert not focuses[a] & focuses[b]


def test_the_splits_of_the_real_medquad_have_the_shares_and_sources_asked_for(medquad):
    documents = {name: split["documents"] for name, split in prepared.read_meta(medquad)["splits"].items()}
    assert documents["val"] / 15_941 == pytest.approx(0.05, abs=0.002)
    assert documents["test"] / 15_941 == pytest.approx(0.1, abs=0.002)


def test_the_lengths_of_the_real_medquad_are_those_measured_before(medquad):
    """The counts include the rows above the limit of 1,024: lengths of all cleaned documents."""
    records = read_lines(medquad.parent / "medquad_alpaca.jsonl")
    gpt2 = tokenizer.load("gpt2")
    prompts = [len(gpt2.encode(format_prompt("alpaca", record["instruction"]))) for record in records]
    lengths = [n + len(gpt2.encode(record["output"])) for n, record in zip(prompts, records, strict=True)]
    counts = {limit: sum(n + 1 <= limit for n in lengths) for limit in (768, 512, 256, 128)}
    assert counts == {768: 15_556, 512: 14_305, 256: 9_292, 128: 3_419}


def test_token_files_hold_prompt_response_and_end_of_text_of_each_line(medquad):
    gpt2 = tokenizer.load("gpt2")
    ids = np.fromfile(medquad / "val.bin", dtype="<u2")
    index = np.load(medquad / "val.index.npy")
    rows = read_lines(medquad / "val.jsonl")
    assert len(rows) == len(index) and index[-1, 2] == len(ids)
    for row, (start, response, end) in list(zip(rows, index, strict=True))[:50]:
        assert ids[start:response].tolist() == gpt2.encode(format_prompt("alpaca", row["instruction"]))
        assert ids[response:end].tolist() == [*gpt2.encode(row["output"]), 50256]


def test_the_whole_export_has_what_the_splits_have_and_what_was_too_long(medquad):
    assert len(read_lines(medquad.parent / "medquad_alpaca.jsonl")) == 16_359


def test_the_same_input_and_seed_give_the_same_bytes_anywhere(tmp_path):
    first, second = (preparation.prepare(sample(), tmp_path / name).folder for name in ("here", "there"))
    first, second = first.parent, second.parent
    assert contents(first) == contents(second)
    other = preparation.prepare(sample(split_seed=1), tmp_path / "other").folder
    assert contents(first)["val.jsonl"] != contents(other.parent)["val.jsonl"]
    assert contents(first)["sample_alpaca.jsonl"] == contents(other.parent)["sample_alpaca.jsonl"]


def test_the_sample_is_large_enough_and_in_medquads_schema(tmp_path):
    with open(ROOT / "gpt" / "sample.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["question", "answer", "source", "focus_area"]
    assert len(rows) >= 240 and len({row["focus_area"] for row in rows}) == 48
    assert all(row["question"].endswith(" ?") and row["focus_area"] in row["question"] for row in rows)
    meta = prepared.read_meta(preparation.prepare(sample(tokenizer="gpt2"), tmp_path).folder)
    assert meta["tokens_before_length_filter"] > 25_000
    assert meta["ladder"][-1][1] == 288


def test_a_failed_preparation_leaves_what_was_there_and_no_rubbish(tmp_path):
    cfg = small_csv(tmp_path / "small.csv")
    directory = preparation.prepare(cfg, tmp_path).folder
    before = contents(directory)
    (tmp_path / "small.csv").write_text("question,answer\nq,a,b\n")
    problem(cfg, tmp_path, 2)
    assert contents(directory) == before
    assert sorted(os.listdir(tmp_path)) == ["prepared", "small.csv"]


def test_a_refused_preparation_leaves_neither_its_lock_nor_a_folder(tmp_path):
    cfg = small_csv(tmp_path / "small.csv")
    (tmp_path / "small.csv").write_text("question,reply\nq,a\n")
    problem(data_config(**{**vars(cfg), "prepared_dir": "some/where/prepared"}), tmp_path, 2)
    assert os.listdir(tmp_path) == ["small.csv"]


def test_several_starts_prepare_one_after_another_whoever_waits_for_a_lock_that_is_removed(tmp_path):
    cfg, busy, most = small_text(tmp_path / "small.txt"), 0, []

    def prepare():
        nonlocal busy
        with prepared.locked(prepared.directory_of(cfg, tmp_path)):
            busy += 1
            most.append(busy)
            time.sleep(0.002)
            busy -= 1

    threads = [threading.Thread(target=lambda: [prepare() for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and max(most) == 1 and os.listdir(tmp_path) == ["small.txt"]


def test_remains_of_a_killed_preparation_are_cleared_away(tmp_path):
    cfg = small_csv(tmp_path / "small.csv")
    (tmp_path / ".prepared.new").mkdir()
    (tmp_path / ".prepared.new" / "train.bin").write_text("half")
    preparation.prepare(cfg, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["prepared", "small.csv"]


def test_a_second_start_waits_and_then_uses_what_the_first_prepared(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    with open(tmp_path / "prepared.lock", "w") as first:
        lock_descriptor(first.fileno())
        second = threading.Thread(target=preparation.ensure, args=(cfg, tmp_path))
        second.start()
        time.sleep(0.2)
        assert second.is_alive() and not (tmp_path / "prepared").exists()
    second.join(10)
    assert lines() == [
        f"waiting for another process that prepares {tmp_path}/prepared",
        "preparing data=small from small.csv: no prepared data yet",
    ]


def test_a_folder_with_anything_else_in_it_is_never_replaced(tmp_path):
    cfg = small_csv(tmp_path / "small.csv")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.txt").write_text("mine")
    assert "not prepared data: thesis.txt (data.prepared_dir)" in problem(cfg, tmp_path, 2)
    assert (tmp_path / "prepared" / "thesis.txt").read_text() == "mine"
    (tmp_path / "plain").write_text("a file")
    assert "is a file" in problem(data_config(**{**vars(cfg), "prepared_dir": "plain"}), tmp_path, 2)


@pytest.mark.parametrize("place", ["small.csv/below/a/file", "/proc/prepared"])
def test_a_place_that_cannot_be_written_is_an_error_of_the_environment(tmp_path, place):
    cfg = small_csv(tmp_path / "small.csv")
    assert "cannot write" in problem(data_config(**{**vars(cfg), "prepared_dir": place}), tmp_path, 5)


def test_an_empty_split_is_an_error_with_the_counts_and_with_groups_only_where_they_are_the_cause(tmp_path):
    cfg = small_csv(tmp_path / "small.csv", n_topics=3)
    text = problem(cfg, tmp_path, 2)
    assert "a split is empty: train 3, val 0, test 0 documents (data.val_fraction" in text and "random" not in text
    small_csv(tmp_path / "small.csv", n_topics=1)
    with open(tmp_path / "small.csv", "a") as file:
        file.writelines(f"q{i},a,src,topic 0\n" for i in range(3))
    text = problem(cfg, tmp_path, 2)
    assert "a split is empty: train 4, val 0, test 0 documents, as rows with a question or a focus area in" in text
    assert "data.split=random" in text


def test_a_limit_below_every_record_is_an_error(tmp_path):
    cfg = small_csv(tmp_path / "small.csv")
    text = problem(data_config(**{**vars(cfg), "max_tokens": 10}), tmp_path, 2)
    assert "all 20 records are longer than data.max_tokens 10" in text


def test_bad_rows_that_are_left_out_are_counted_and_listed(tmp_path, lines):
    cfg = small_csv(tmp_path / "small.csv")
    with open(tmp_path / "small.csv", "a") as file:
        file.write("q,a\n" * 12)
    assert "small.csv:22: 2 fields, the header has 4" in problem(cfg, tmp_path, 2)
    directory = preparation.prepare(data_config(**{**vars(cfg), "on_bad_row": "skip"}), tmp_path).folder
    assert prepared.read_meta(directory)["ladder"][:2] == [["rows", 32], ["well-formed", 20]]
    listed = (directory.parent / "bad_rows.txt").read_text().splitlines()
    assert len(listed) == 12 and listed[-1] == "small.csv:33: 2 fields, the header has 4"
    shown = [line for line in lines() if line.startswith("small.csv:")]
    assert shown == listed[:10]


@pytest.mark.parametrize("split", ["random", "sequential"])
def test_a_split_that_leaks_is_warned_of(tmp_path, caplog, split):
    preparation.prepare(sample(split=split), tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"data.split={split}: val: 0.0% of the questions occur in train" in warning
    assert "; test: 0.0% of the questions occur in train" in warning and "share their focus with train; data" in warning


def test_nothing_is_said_of_a_split_that_is_empty_or_does_not_leak(tmp_path, caplog):
    cfg = small_csv(tmp_path / "small.csv")
    made = preparation.prepare(data_config(**{**vars(cfg), "split": "random", "test_fraction": 0.0}), tmp_path)
    assert list(made.meta["leaks"]) == ["val"]
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_what_is_odd_about_texts_is_said(tmp_path, caplog):
    for name in ("a.txt", "B.TXT", "c.md", "more/d.jsonl", ".DS_Store"):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(f"{name}<|endoftext|>\n" * 20)
    (tmp_path / "books" / "e.txt.gz").write_bytes(gzip.compress(b"e" * 50))
    cfg = data_config(kind="text", path="books", prepared_dir="out", document_separator="***")

    def warnings():
        caplog.clear()
        preparation.prepare(cfg, tmp_path)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    marks, nowhere, left_out = warnings()
    assert marks.startswith("<|endoftext|> occurs 40 times and is learned as text")
    assert nowhere == 'data.document_separator="***" occurs nowhere'
    assert left_out.endswith("as they do not end in .txt or .txt.gz: c.md, more/d.jsonl")
    cfg = data_config(kind="text", path="books/more/d.jsonl", prepared_dir="out", document_separator="<|endoftext|>")
    assert warnings() == ["d.jsonl: learned as text as it stands; data=alpaca reads rows"]


def test_helpsteer_from_json_lines_groups_prompts_and_describes_the_scores(tmp_path):
    rows = [{"prompt": f"p{i // 4}\n", "response": f" r{i}", "helpfulness": i % 5, "coherence": 4} for i in range(80)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = preparation.prepare(data_config(kind="helpsteer", path="h.jsonl", prepared_dir="out"), tmp_path).folder
    shown = directory.parent
    prompts = [{row["instruction"] for row in read_lines(shown / f"{name}.jsonl")} for name in ("train", "val", "test")]
    assert [len(found) for found in prompts] == [16, 2, 2] and len(set.union(*prompts)) == 20
    assert read_lines(shown / "test_alpaca.jsonl")[0] == {"instruction": "p0\n", "input": "", "output": " r0"}
    assert prepared.read_meta(directory)["scores"]["helpfulness"]["mean"] == 2
    assert "| helpfulness | 80 | 2 |" in (shown / "README.md").read_text()


def test_alpaca_from_a_json_array_uses_the_template_with_input(tmp_path):
    rows = [{"instruction": f"i{i}", "input": "x" if i % 2 else "", "output": "o"} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    directory = preparation.prepare(data_config(kind="alpaca", path="a.json", prepared_dir="out"), tmp_path).folder
    ids, index = np.fromfile(directory / "val.bin", dtype="<u2"), np.load(directory / "val.index.npy")
    row = read_lines(directory / "val.jsonl")[0]
    prompt = format_prompt("alpaca", row["instruction"], row["input"])
    assert bytes(ids[: index[0, 1]].tolist()).decode() == prompt


def test_documents_of_a_text_end_at_its_separator_which_is_said_where_it_stays_text(tmp_path, lines):
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join("abcdefghi\n" for _ in range(20)))
    cfg = data_config(kind="text", path="a.txt", prepared_dir="out", val_fraction=0.2, test_fraction=0.0)
    before = prepared.read_meta(preparation.ensure(cfg, tmp_path).folder)
    assert any("<|endoftext|> occurs 19 times" in line and "data.document_separator=" in line for line in lines())
    assert "document_separator" not in before["settings"]  # so that data of older versions is what it was
    cfg = data_config(**{**vars(cfg), "document_separator": "<|endoftext|>"})
    directory = preparation.ensure(cfg, tmp_path).folder
    assert "data.document_separator changed" in lines()[-1]
    ids = np.fromfile(directory / "train.bin", dtype="<u2").tolist()
    assert ids.count(256) == 16 - 1 and bytes(ids[:9]) == b"abcdefghi" and ids[9:11] == [256, ord("a")]
    assert preparation.ensure(cfg, tmp_path).folder == directory


@pytest.mark.skipif(not THE_VERDICT.exists(), reason=f"{THE_VERDICT} is not there")
def test_the_verdict_gives_4612_and_534_tokens(tmp_path):
    cfg = data_config(kind="text", path=str(THE_VERDICT), prepared_dir="out", tokenizer="gpt2", test_fraction=0.0)
    directory = preparation.prepare(cfg, tmp_path).folder
    assert [np.load(directory / f"{name}.index.npy").tolist() for name in ("train", "val", "test")] == [
        [[0, 0, 4612]], [[0, 0, 534]], [],
    ]  # fmt: skip


def test_several_texts_are_joined_by_the_end_of_text_and_cut_by_characters(tmp_path):
    (tmp_path / "books").mkdir()
    for name, text in (("a", "a" * 50), ("b", ""), ("c", "c" * 50)):
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    cfg = data_config(kind="text", path="books", prepared_dir="out", val_fraction=0.2, test_fraction=0.1)
    directory = preparation.prepare(cfg, tmp_path).folder
    ids = [np.fromfile(directory / f"{name}.bin", dtype="<u2").tolist() for name in ("train", "val", "test")]
    assert ids == [[97] * 50 + [256] + [99] * 20, [99] * 20, [99] * 10]


def test_texts_have_the_ids_of_each_split_at_once_however_they_are_read_and_cut(tmp_path, monkeypatch):
    """Files, gzipped or not, with Windows line ends, pieces that end anywhere: as if all were in memory."""
    monkeypatch.setattr(text_files, "PIECE", 50)
    monkeypatch.setattr(token_files, "PIECE", 20)
    gpt2, eos = tokenizer.load("gpt2"), 50256
    for seed in range(12):
        rng = random.Random(seed)
        texts = ["".join(made_texts(rng.choice([0, 1, 9, 40]), seed=rng.random())) for _ in range(rng.randint(1, 6))]
        folder = tmp_path / str(seed)
        folder.mkdir()
        for i, text in enumerate(texts):
            content = text.replace("\n", "\r\n").encode() if i % 2 else text.encode()
            (folder / f"{i}.txt").write_bytes(gzip.compress(content) if i % 3 else content)
            texts[i] = content.decode("utf-8-sig").replace("\r\n", "\n")
        fractions = {"val_fraction": rng.uniform(0.2, 0.5), "test_fraction": rng.choice([0.0, 0.3])}
        cfg = data_config(kind="text", path=str(folder), prepared_dir=f"out {seed}", tokenizer="gpt2", **fractions)
        if sum(map(len, texts)) < 20:  # a split would be empty
            continue
        directory = preparation.prepare(cfg, tmp_path).folder
        for name, first, last in splits.text_ranges(sum(map(len, texts)), cfg):
            expected, before = [], 0
            for text in texts:
                piece = text[max(0, first - before) : max(0, last - before)]
                before += len(text)
                expected += [eos] * (bool(expected) and bool(piece)) + gpt2.encode(piece)
            ids = np.fromfile(directory / f"{name}.bin", dtype="<u2").tolist()
            assert ids == expected, f"seed {seed}, {name}"
            index = [[0, 0, len(ids)]] if ids else []
            assert np.load(directory / f"{name}.index.npy").tolist() == index
        for name, file in prepared.read_meta(directory)["files"].items():
            assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == file["sha256"]
        assert prepared.read_meta(directory)["source"]["files"] == preparation.sources.local(cfg, tmp_path).identity()


def test_a_text_is_prepared_in_memory_that_does_not_depend_on_its_length(tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(token_files, "AHEAD", 4)
    line = "The quick brown fox, 12 years old, doesn't jump; an \u00e9tude: it's over the lazy dog.\n"
    peaks = []
    for size in (1_000_000, 5_000_000):
        (tmp_path / "a.txt").write_text(line * (size // len(line)), encoding="utf-8")
        tracemalloc.start()
        preparation.prepare(data_config(kind="text", path="a.txt", prepared_dir="out", tokenizer="gpt2"), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    record_property("count", f"memory to prepare 1 and 5 MB of text: {peaks[0] / 1e6:.1f} and {peaks[1] / 1e6:.1f} MB")
    assert peaks[1] < peaks[0] + 300_000


# The peak of the process itself: what resource.getrusage tells begins with that of the process it was forked from.
RUN_AND_TELL_PEAK = """
import atexit, re, runpy, sys
del sys.argv[0]
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.exhaustive
def test_the_peak_memory_of_the_command_is_the_same_for_5_and_for_100_megabytes(tmp_path, record_property):
    line = "The quick brown fox, 12 years old, doesn't jump; an \u00e9tude: it's over the lazy dog.\n"
    peaks = []
    for size in (5_000_000, 100_000_000):
        with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
            file.writelines(itertools.repeat(line, size // len(line)))
        arguments = ["data=text", f"data.path={tmp_path}/a.txt", f"data.prepared_dir={tmp_path}/out"]
        command = [sys.executable, "-c", RUN_AND_TELL_PEAK, str(ROOT / "prepare_data.py"), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    record_property("count", f"peak memory to prepare 5 and 100 MB of text: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert peaks[1] < peaks[0] + 20 and peaks[1] < 150


def test_an_empty_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    cfg = data_config(kind="text", path="a.txt", prepared_dir="out")
    assert "a split is empty" in problem(cfg, tmp_path, 2)
