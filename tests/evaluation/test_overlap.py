"""The longest span that a text shares with a corpus."""

import random

from gpt.evaluation.overlap import longest_spans, words


def by_hand(text, corpus):
    own, best = words(text), 0
    for other in map(words, corpus):
        for i in range(len(own)):
            for j in range(len(other)):
                k = 0
                while i + k < len(own) and j + k < len(other) and own[i + k] == other[j + k]:
                    k += 1
                best = max(best, k)
    return best


def test_spans_are_those_that_comparing_every_place_with_every_other_finds():
    rng = random.Random(0)
    for _ in range(30):
        corpus = [" ".join(rng.choices("abcd", k=rng.randrange(30))) for _ in range(6)]
        texts = [" ".join(rng.choices("abcde", k=rng.randrange(25))) for _ in range(5)]
        assert longest_spans(texts, corpus) == [by_hand(text, corpus) for text in texts]


def test_case_and_punctuation_do_not_count_and_no_span_goes_from_one_text_into_the_next():
    assert longest_spans(["Drink water, and REST!"], ["...drink water and rest."]) == [4]
    assert longest_spans(["a b c d"], ["a b", "c d"]) == [2]
    assert longest_spans(["a b", "c d"], ["a b c d"]) == [2, 2]


def test_nothing_is_shared_with_nothing():
    assert longest_spans(["", "a"], []) == [0, 0]
    assert longest_spans([], ["a"]) == []
    assert longest_spans(["?!", "x"], ["a b"]) == [0, 0]
