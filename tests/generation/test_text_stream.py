"""Text that is shown while it is made: whole characters, and no part of a string that ends it."""

import random

import pytest

from gpt import tokenizer
from gpt.generation.text_stream import before, n_begun, pieces, whole_characters

BYTES, GPT2 = tokenizer.load("bytes"), tokenizer.load("gpt2")


@pytest.mark.parametrize("tokens", [BYTES, GPT2], ids=["bytes", "gpt2"])
def test_a_character_of_several_tokens_waits_until_it_is_whole(tokens):
    ids = tokens.encode("é漢🙂 \U00013000!")
    assert len(ids) > 7
    assert list(whole_characters(ids, tokens.decode)) == ["é", "漢", "🙂", " ", "\U00013000", "!"]


def test_each_piece_comes_before_the_next_id_is_asked_for():
    taken = []
    texts = pieces((taken.append(i) or i for i in BYTES.encode("ab")), BYTES.decode, [])
    assert next(texts) == "a" and len(taken) == 1


@pytest.mark.parametrize("tokens", [BYTES, GPT2], ids=["bytes", "gpt2"])
def test_of_any_ids_the_pieces_together_are_the_whole_text_and_no_character_changes_later(tokens):
    """Most bytes in a random order are no UTF-8."""
    draw = random.Random(0)
    n_bad = 0
    for _ in range(300):
        ids = [draw.randrange(tokens.eos) for _ in range(draw.randrange(12))]
        ids += tokens.encode(draw.choice(["", "é", "🙂", "\ufffd"]))[: draw.randrange(1, 5)]
        assert "".join(whole_characters(ids, tokens.decode)) == tokens.decode(ids)
        n_bad += "\ufffd" in tokens.decode(ids)
    assert n_bad > 30


def test_bytes_that_are_no_utf_8_do_not_keep_text_back_for_long():
    shown = list(whole_characters([0x80] * 100 + BYTES.encode("a"), BYTES.decode))
    assert len(shown) == 100 and "".join(shown) == "\ufffd" * 100 + "a"


def stopped(text: str, stop: list[str], sizes: list[int]) -> str:
    """The text up to a stop string, where it comes in pieces of so many characters."""
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return "".join(before(stop, [*parts, text[at:]]))


def expected(text: str, stop: list[str]) -> str:
    """By trying every end, and for each the longest string that ends there."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_however_a_text_is_cut_into_pieces_it_ends_before_the_first_complete_stop_string():
    draw = random.Random(0)
    n_stopped = 0
    for _ in range(2000):
        text = "".join(draw.choices("ab#", k=draw.randrange(12)))
        stop = ["".join(draw.choices("ab#", k=draw.randrange(1, 5))) for _ in range(draw.randrange(4))]
        sizes = [draw.randrange(4) for _ in range(6)]
        assert stopped(text, stop, sizes) == expected(text, stop), (text, stop, sizes)
        n_stopped += expected(text, stop) != text
    assert n_stopped > 500


def test_what_may_be_the_beginning_of_a_stop_string_is_not_shown_before_it_is_certain():
    texts = before(["\n###"], iter(["a\n", "#", "# b", "\n##", "# c"]))
    assert list(texts) == ["a", "\n## b"]
    assert [n_begun(text, "###") for text in ("", "a", "#", "a##", "###")] == [0, 0, 1, 2, 2]


def test_after_a_stop_string_no_more_ids_are_taken():
    ids = iter(BYTES.encode("one ### two"))
    assert "".join(pieces(ids, BYTES.decode, ["###"])) == "one "
    assert BYTES.decode(list(ids)) == " two"


def test_a_stop_string_that_never_comes_costs_nothing_of_the_text():
    assert "".join(pieces(BYTES.encode("one ##"), BYTES.decode, ["###"])) == "one ##"
