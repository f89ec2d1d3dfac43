"""ROUGE, BLEU and chrF are those of the libraries; F1 and exact match are SQuAD's."""

import pytest
from sacrebleu.metrics import BLEU, CHRF

from gpt.evaluation import similarity
from gpt.evaluation.similarity import distinct, scores, squad_f1
from gpt.evaluation.statistics import figures

ANSWERS = ["Rest and water help most people.", "no", "See a doctor, or rest.", ""]
REFERENCES = ["Rest, water and sleep help.", "No.", "Call a doctor now or rest at home.", "Nothing is known."]


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [  # vectors of rouge_score's own tests
        ("testing one two", "testing", {"ROUGE-1": 1 / 2}),
        ("testing one two", "testing one", {"ROUGE-2": 2 / 3, "ROUGE-L": 4 / 5}),
        ("testing one two", "testing two", {"ROUGE-L": 4 / 5}),
        ("testing one two", "", {"ROUGE-1": 0, "ROUGE-2": 0, "ROUGE-L": 0}),
        ("/", "/", {"ROUGE-1": 0, "ROUGE-L": 0}),
    ],
)
def test_rouge_has_the_published_vectors(reference, answer, expected):
    found = scores(answer, reference)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_f1_and_exact_match_forget_case_punctuation_and_articles():
    assert squad_f1("A cat sat down.", "the cat sat") == pytest.approx(0.8)
    assert scores("The answer, Croup!", "answer croup")["exact match"] == 1.0
    assert squad_f1("", "x") == 0.0 and squad_f1("the", "a") == 1.0


def test_bleu_and_chrf_of_a_corpus_are_sacrebleus():
    measures = similarity.measures([scores(*pair) for pair in zip(ANSWERS, REFERENCES, strict=True)])
    assert measures["BLEU"].total() == BLEU().corpus_score(ANSWERS, [REFERENCES]).score
    assert measures["chrF"].total() == CHRF().corpus_score(ANSWERS, [REFERENCES]).score
    assert "tok:13a|smooth:exp" in similarity.signatures()["BLEU"]
    assert "nc:6|nw:0" in similarity.signatures()["chrF"]


def test_the_interval_of_a_corpus_score_is_near_that_of_sacrebleus_own_bootstrap():
    answers, references = ANSWERS[:3] * 10, REFERENCES[:3] * 10
    rows = [scores(*pair) for pair in zip(answers, references, strict=True)]
    own = figures({"model": {"chrF": similarity.measures(rows)["chrF"]}}, 1000, 0)["model"]["chrF"]
    other = CHRF().corpus_score(answers, [references], n_bootstrap=1000)
    assert (own.high - own.low) / 2 == pytest.approx(other._ci, rel=0.2)


def test_repetition_and_distinct_words_tell_a_loop_from_a_text():
    loop, text = scores("a b c d " * 5, "x"), scores("one two three four five six", "x")
    assert loop["repetition"] == pytest.approx(1 - 4 / 17) and text["repetition"] == 0.0
    assert loop["distinct-1"] == pytest.approx(4 / 20) and text["distinct-1"] == 1.0
    assert distinct([], 1) == 1.0


def test_the_length_ratio_is_of_all_words_and_an_empty_answer_has_no_words():
    rows = [scores("a b", "a b c d"), scores("", "e f")]
    assert similarity.measures(rows)["length ratio"].total() == pytest.approx(2 / 6)
