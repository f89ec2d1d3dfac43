"""Token files hold exactly what the tokenizer says, however the work was divided."""

import hashlib
import itertools
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from conftest import THE_VERDICT
from test_tokenizer import made_texts

from gpt import tokenizer
from gpt.data import token_files
from gpt.data.records import Record
from gpt.errors import UserError
from gpt.prompts import TEMPLATES, format_prompt

GPT2 = tokenizer.load("gpt2")
# Where a shortcut could go wrong: whitespace at a border, contractions, digits, other scripts, nothing at all.
STARTS = ["What is it ?", " it", "\nit", "\u00a0it", "'s", "123", "é", "日本", "<|endoftext|>", "\x1cit", ".", ""]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_encoded_as_if_each_were_encoded_alone(template):
    records = [Record(start, extra, start + extra) for start in STARTS for extra in ("", "an input")]
    encoded = token_files.encode_records(iter(records), template, GPT2)
    for record, (prompt, response) in zip(records, encoded, strict=True):
        assert prompt.tolist() == GPT2.encode(format_prompt(template, record.instruction, record.input))
        assert response.tolist() == GPT2.encode(record.output)


def test_the_header_has_24_tokens_and_the_response_header_6():
    ((prompt, _),) = token_files.encode_records([Record("X", "", "")], "alpaca", GPT2)
    assert len(prompt) == 24 + 1 + 6


@pytest.mark.parametrize("batch", [1, 50, 10_000])
def test_many_texts_come_back_in_their_order(monkeypatch, batch):
    monkeypatch.setattr(token_files, "BATCH", batch)  # characters
    texts = [str(i) * (i % 7) for i in range(1000)]
    assert [GPT2.decode(ids.tolist()) for ids in token_files.encode(iter(texts), GPT2)] == texts


def test_few_items_are_taken_ahead_of_the_results_and_errors_of_both_sides_arrive():
    taken = 0

    def items():
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken
        raise OSError("the last")

    results = token_files.in_order(lambda i: 100 // (i - 40), items())
    for n in range(1, 40):
        assert next(results) == 100 // (n - 40)
        assert taken <= n + token_files.AHEAD + (os.cpu_count() or 1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(OSError, match="the last"):
        list(token_files.in_order(str, items()))


def cut(text, size):
    """The pieces of a text that comes in chunks of `size` characters."""
    chunks = (text[i : i + size] for i in range(0, len(text), size))
    return list(token_files.pieces(chunks, GPT2.safe_cut, "a.txt"))


@pytest.mark.parametrize("piece, chunk", [(1, 1), (1, 50), (5, 3), (5, 1000), (100, 7)])
def test_pieces_have_the_ids_of_the_whole(monkeypatch, record_property, piece, chunk):
    monkeypatch.setattr(token_files, "PIECE", piece)
    n_pieces = 0
    texts = ["".join(made_texts(20, seed)) for seed in range(25)]
    for text in texts:
        pieces = cut(text, chunk)
        ids = [i for part in pieces for i in GPT2.encode(part)]
        assert "".join(pieces) == text and ids == GPT2.encode(text), f"{text!a} in chunks of {chunk}"
        n_pieces += len(pieces)
    record_property(
        "count", f"pieces of at least {piece} characters, from chunks of {chunk}: {n_pieces:,}, no id changed"
    )
    assert n_pieces > len(texts) * (10 if piece < 100 else 1)


@pytest.mark.skipif(not THE_VERDICT.exists(), reason=f"{THE_VERDICT} is not there")
def test_the_verdict_has_5145_tokens(monkeypatch):
    text = THE_VERDICT.read_text(encoding="utf-8")
    monkeypatch.setattr(token_files, "PIECE", 100)
    ids = [i for piece in cut(text, 64) for i in GPT2.encode(piece)]
    assert len(text) == 20_479 and len(ids) == 5_145 and ids == GPT2.encode(text)
    assert max(map(len, cut(text, 64))) < 120


@pytest.mark.parametrize("end", ["", " c", "\n"])
def test_a_word_without_an_end_is_not_drawn_into_memory(monkeypatch, end):
    monkeypatch.setattr(token_files, "PIECE", 100)
    monkeypatch.setattr(token_files, "UNCUT_LIMIT", 1000)
    assert [len(piece) for piece in cut("b " + "ACGT" * 250 + end, 10)] == [1002] + ([len(end)] if end else [])
    taken = itertools.chain(["b "], itertools.repeat("AC\x1bT", 10**9))
    with pytest.raises(
        UserError, match=r"a.txt: a word of more than 1,000 characters, in it '.*C\\x1bTA.*'; put line ends"
    ):
        list(token_files.pieces(taken, GPT2.safe_cut, "a.txt"))


def write(directory, split, *documents):
    """The files of a split of documents, each a prompt and a response of ids. Returns its counts."""
    with token_files.Writer(directory, split) as writer:
        for prompt, response in documents:
            writer.add(np.concatenate([prompt, response]).astype(np.uint16))
            writer.end_document(len(prompt))
        return writer.finish()


def test_the_index_says_where_documents_and_responses_begin(tmp_path):
    counts = write(tmp_path, "train", ([1, 2], [3, 50256]), ([3], [50256]))
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert ids.tolist() == [1, 2, 3, 50256, 3, 50256]
    assert np.load(tmp_path / "train.index.npy").tolist() == [[0, 2, 4], [4, 5, 6]]
    assert counts == {"documents": 2, "tokens": 6, "response_tokens": 3}


def test_a_text_is_one_document_that_is_all_response_and_a_split_may_be_empty(tmp_path):
    with token_files.Writer(tmp_path, "val") as writer:
        writer.add(np.arange(5, dtype=np.uint16))
        assert writer.finish()["response_tokens"] == 5
    assert np.load(tmp_path / "val.index.npy").tolist() == [[0, 0, 5]]
    assert write(tmp_path, "test")["documents"] == 0
    assert np.load(tmp_path / "test.index.npy").shape == (0, 3)


def test_the_ids_of_a_document_come_in_any_parts(tmp_path):
    with token_files.Writer(tmp_path, "val") as writer:
        for part in ([1, 2, 3], [], [40_000], [7]):
            writer.add(np.array(part, dtype=np.uint16))
        counts = writer.finish()
    content = (tmp_path / "val.bin").read_bytes()
    assert np.frombuffer(content, "<u2").tolist() == [1, 2, 3, 40_000, 7]
    assert counts == {"documents": 1, "tokens": 5, "response_tokens": 5}


def test_ids_of_a_large_vocabulary_take_four_bytes_and_are_read_as_they_were_written(tmp_path):
    with token_files.Writer(tmp_path, "val", np.uint32) as writer:
        writer.add(np.array([1, 151_642, 2], dtype=np.uint32))
        writer.end_document(1)
        writer.finish()
    ids, documents = token_files.read(tmp_path, "val")
    assert (ids.dtype, ids.tolist(), documents.tolist()) == (np.uint32, [1, 151_642, 2], [[0, 1, 3]])
    assert (tmp_path / "val.bin").stat().st_size == 12 and token_files.largest_id(tmp_path, "val") == 151_642


def listed(directory):
    """What meta.json says of the files in a directory."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in directory.iterdir()
    }


def test_the_largest_id_is_known_after_a_check_without_reading_the_file_again(tmp_path):
    documents = [([], [5, 30_000, 2]), ([], [4])]
    write(tmp_path, "train", *documents)
    write(tmp_path, "test")
    assert [token_files.largest_id(tmp_path, name) for name in ("train", "test")] == [30_000, 0]
    write(tmp_path, "train", *documents[1:])
    token_files.check(tmp_path, listed(tmp_path))
    status = (tmp_path / "train.bin").stat()
    (tmp_path / "train.bin").write_bytes(b"\xff\xff")  # what reading it again would show
    os.utime(tmp_path / "train.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert token_files.largest_id(tmp_path, "train") == 4
    write(tmp_path, "train", *documents)  # another file of that name
    assert token_files.largest_id(tmp_path, "train") == 30_000


def test_a_file_that_another_rank_has_hashed_is_not_read_and_its_copy_is(tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    write(first, "train", ([], [5, 30_000, 2]))
    files = listed(first)
    token_files.check(first, files)
    known = json.loads(json.dumps(token_files.seen(first, files)))
    shutil.copytree(first, other)  # with the same times
    for folder in (first, other):
        status = (folder / "train.bin").stat()
        (folder / "train.bin").write_bytes(b"\xff\xff" * 3)
        os.utime(folder / "train.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    token_files.check(first, files, known)
    assert token_files.largest_id(first, "train") == 30_000
    with pytest.raises(UserError, match=r"train\.bin damaged \(sha256 differs\)"):
        token_files.check(other, files, known)


def test_the_largest_id_is_handed_on_also_of_files_that_were_just_written(tmp_path):
    write(tmp_path, "train", ([], [5, 30_000, 2]))
    assert token_files.seen(tmp_path, listed(tmp_path))["train.bin"][-1] == 30_000


def test_a_check_of_token_files_maps_nothing_and_takes_no_memory(tmp_path):
    write(tmp_path, "train", ([], np.arange(8_000_000, dtype=np.uint16)))
    files = listed(tmp_path)
    tracemalloc.start()
    token_files.check(tmp_path, files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
