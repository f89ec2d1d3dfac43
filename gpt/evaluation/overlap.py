"""Measures how long a span of words some texts share with a corpus, exactly and without an index."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lower-case letters and digits in a row, as rouge_score takes them."""
    return WORD.findall(text.lower())


def longest_spans(texts: Sequence[str], corpus: Iterable[str]) -> list[int]:
    """The number of words in the longest span of each text that occurs in one text of the corpus.

    Spans are compared at one length after the other; places where a shorter one is not shared are given up. A span has
    the number that its first words and its last word make, so nothing is hashed.
    """
    numbers: dict[str, int] = {}
    queries, owners = _joined(texts, numbers)
    found, _ = _joined(corpus, numbers)
    longest = np.zeros(len(texts), dtype=np.int64)
    q, q_span = np.arange(len(queries)), np.zeros(len(queries), dtype=np.int64)
    c, c_span = np.arange(len(found)), np.zeros(len(found), dtype=np.int64)
    length = 0
    while len(q) and len(c):
        q, q_span = _extended(queries, q, q_span, length)
        c, c_span = _extended(found, c, c_span, length)
        if not len(q) or not len(c):
            break
        known, q_span = np.unique(q_span, return_inverse=True)
        place = np.searchsorted(known, c_span).clip(max=len(known) - 1)
        is_shared = known[place] == c_span
        c, c_span = c[is_shared], place[is_shared]
        occurs = np.zeros(len(known), dtype=bool)
        occurs[c_span] = True
        q, q_span = q[occurs[q_span]], q_span[occurs[q_span]]
        length += 1
        longest[np.unique(owners[q])] = length
    return longest.tolist()


END = 0  # of a text


def _joined(texts: Iterable[str], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all words of all texts, each text with END after it, and the number of the text at each place."""
    ids: list[int] = []
    lengths: list[int] = []
    for text in texts:
        own = [numbers.setdefault(word, len(numbers) + 1) for word in words(text)]
        ids += [*own, END]
        lengths.append(len(own) + 1)
    return np.array(ids, dtype=np.int64), np.repeat(np.arange(len(lengths)), lengths)


def _extended(ids: np.ndarray, starts: np.ndarray, spans: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans of `length` words with one more; those that end with their text are left out."""
    last = ids[starts + length]
    goes_on = last != END
    return starts[goes_on], (spans[goes_on] << 32) | last[goes_on]
