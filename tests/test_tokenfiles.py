"""Token files hold exactly what the tokenizer says, however the work was divided."""

import numpy as np
import pytest
from conftest import THE_VERDICT

from gpt import tokenfiles, tokenizer
from gpt.prompts import TEMPLATES, format_prompt
from gpt.records import Record

GPT2 = tokenizer.load("gpt2")
# Where a shortcut could go wrong: whitespace at a border, contractions, digits, other scripts, nothing at all.
STARTS = ["What is it ?", " it", "\nit", "\u00a0it", "'s", "123", "é", "日本", "<|endoftext|>", "\x1cit", ".", ""]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_encoded_as_if_each_were_encoded_alone(template):
    records = [Record(start, extra, "") for start in STARTS for extra in ("", "an input")]
    encoded = tokenfiles.encode_prompts(records, template, GPT2)
    for record, ids in zip(records, encoded, strict=True):
        assert ids.tolist() == GPT2.encode(format_prompt(template, record.instruction, record.input))


def test_the_header_has_24_tokens_and_the_response_header_6():
    (ids,) = tokenfiles.encode_prompts([Record("X", "", "")], "alpaca", GPT2)
    assert len(ids) == 24 + 1 + 6


def test_many_texts_come_back_in_their_order():
    texts = [str(i) * (i % 7) for i in range(1000)]
    assert [GPT2.decode(ids.tolist()) for ids in tokenfiles.encode(texts, GPT2)] == texts


def test_a_long_text_is_encoded_as_if_at_once(monkeypatch):
    monkeypatch.setattr(tokenfiles, "PIECE", 5)  # characters
    text = "\n".join(["one ", "", "two", "\n\n three", "four\n", "\t", "five's\u2028", " 6", "\r", "", "", "seven"] * 3)
    assert tokenfiles.encode_long(text, GPT2).tolist() == GPT2.encode(text)
    assert tokenfiles.encode_long("", GPT2).tolist() == []


@pytest.mark.skipif(not THE_VERDICT.exists(), reason=f"{THE_VERDICT} is not there")
def test_the_verdict_has_5145_tokens(monkeypatch):
    text = THE_VERDICT.read_text(encoding="utf-8")
    monkeypatch.setattr(tokenfiles, "PIECE", 100)
    ids = tokenfiles.encode_long(text, GPT2)
    assert len(text) == 20_479 and len(ids) == 5_145 and ids.tolist() == GPT2.encode(text)


def test_the_index_says_where_documents_and_responses_begin(tmp_path):
    parts = [np.array(part, dtype=np.uint16) for part in ([1, 2], [3], [50256])]
    counts = tokenfiles.write(tmp_path, "train", [parts, parts[1:]], response=1)
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert ids.tolist() == [1, 2, 3, 50256, 3, 50256]
    assert np.load(tmp_path / "train.index.npy").tolist() == [[0, 2, 4], [4, 5, 6]]
    assert counts == {"documents": 2, "tokens": 6, "response_tokens": 3}


def test_a_text_is_one_document_that_is_all_response_and_a_split_may_be_empty(tmp_path):
    assert tokenfiles.write(tmp_path, "val", [[np.arange(5, dtype=np.uint16)]], response=None)["response_tokens"] == 5
    assert np.load(tmp_path / "val.index.npy").tolist() == [[0, 0, 5]]
    assert tokenfiles.write(tmp_path, "test", [], response=None)["documents"] == 0
    assert np.load(tmp_path / "test.index.npy").shape == (0, 3)
