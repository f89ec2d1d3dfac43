"""Answers questions without a model: what training data has for a similar question, or for any. They are the zero that
scores are read from."""

import logging
from collections import Counter
from collections.abc import Sequence

from gpt.evaluation.overlap import words
from gpt.prompts import Question

NEAREST, FREQUENT, ANOTHER = "BM25 baseline", "most frequent answer", "another's reference"
K1, B = 1.5, 0.75  # of BM25 (Robertson et al., 1994), as most have it


def answers(questions: Sequence[Question], training: Sequence[Question]) -> dict[str, list[str]]:
    """{baseline: its answer to each question}. Without training data, only another question's reference is there."""
    found = {}
    if training:
        found[NEAREST] = [training[i].reference or "" for i in nearest(questions, training)]
        found[FREQUENT] = [most_frequent(training)] * len(questions)
    if len(questions) > 1:
        found[ANOTHER] = [questions[i - 1].reference or "" for i in range(len(questions))]
    return found


def nearest(questions: Sequence[Question], training: Sequence[Question]) -> list[int]:
    """The number of the training question that is most like each question by BM25; the first of equal ones."""
    import bm25s  # 0.3 s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its own level is DEBUG
    index = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
    index.index([_terms(question) for question in training], show_progress=False)
    return [int(index.get_scores(_terms(question)).argmax()) for question in questions]


def _terms(question: Question) -> list[str]:
    return words(f"{question.instruction} {question.input}") or ["?"]  # the library takes no empty text


def most_frequent(training: Sequence[Question]) -> str:
    """The answer that most training questions have; the first of equal ones, so of answers that all differ any one."""
    return Counter(question.reference or "" for question in training).most_common(1)[0][0]
