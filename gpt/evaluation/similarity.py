"""Compares an answer with a reference: ROUGE by rouge_score, BLEU and chrF by sacrebleu, overlap of words as SQuAD has
it, and what can be said of an answer alone."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gpt.evaluation import statistics
from gpt.evaluation.overlap import words
from gpt.evaluation.statistics import Measure

ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}  # F measures, without stemming
REPEATED = 4  # words in a span that is repeated


def scores(answer: str, reference: str) -> dict[str, Any]:
    """What is known of one answer; `bleu` and `chrf` are counts, which are summed over questions."""
    rouge = _rouge().score(reference, answer)
    own, others = words(answer), words(reference)
    spans = grams(own, REPEATED)
    bleu, chrf = (metric._extract_corpus_statistics([answer], [[reference]])[0] for metric in (_bleu(), _chrf()))
    return {
        **{name: rouge[key].fmeasure for name, key in ROUGE.items()},
        "F1": squad_f1(answer, reference),
        "exact match": float(squad_words(answer) == squad_words(reference)),
        "words": len(own),
        "reference words": len(others),
        "distinct-1": distinct(own, 1),
        "distinct-2": distinct(own, 2),
        "repetition": 1 - len(set(spans)) / len(spans) if spans else 0.0,
        "bleu": [int(n) for n in bleu],
        "chrf": [int(n) for n in chrf],
    }


def measures(rows: Sequence[dict[str, Any]]) -> dict[str, Measure]:
    """The figures over questions of what `scores` gives for each. BLEU and chrF are of the whole corpus."""
    means = [*ROUGE, "F1", "exact match", "distinct-1", "distinct-2", "repetition"]
    own = {name: statistics.mean([row[name] for row in rows], name == "exact match") for name in means}
    chrf = Measure(np.array([row["chrf"] for row in rows], float), _each(_chrf()))
    bleu = Measure(np.array([row["bleu"] for row in rows], float), _each(_bleu()))
    length = statistics.ratio([row["words"] for row in rows], [row["reference words"] for row in rows])
    first = {name: own[name] for name in [*ROUGE, "F1"]}
    return first | {"chrF": chrf, "BLEU": bleu} | own | {"length ratio": length}


def signatures() -> dict[str, str]:
    """sacrebleu's word for how BLEU and chrF are computed."""
    for metric in (_bleu(), _chrf()):  # it is complete once the number of references is known
        metric.corpus_score(["a"], [["a"]])
    return {"BLEU": str(_bleu().get_signature()), "chrF": str(_chrf().get_signature())}


def squad_words(text: str) -> list[str]:
    """Words as SQuAD's evaluation takes them: lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def squad_f1(answer: str, reference: str) -> float:
    """Twice the words in common by the words in both, each word as often as it occurs (Rajpurkar et al., 2016)."""
    own, others = squad_words(answer), squad_words(reference)
    common = (Counter(own) & Counter(others)).total()
    return 2 * common / (len(own) + len(others)) if common else float(own == others)


def distinct(own: Sequence[str], n: int) -> float:
    """The share of different spans of n words among those of one answer; 1 where it has none."""
    spans = grams(own, n)
    return len(set(spans)) / len(spans) if spans else 1.0


def grams(own: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All spans of n words."""
    return [tuple(own[i : i + n]) for i in range(len(own) - n + 1)]


def _each(metric: Any) -> Any:
    def value(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        values = [metric._compute_score_from_stats(row.astype(int).tolist()).score for row in flat]
        return np.array(values).reshape(sums.shape[:-1])

    return value


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer  # 2 s

    return rouge_scorer.RougeScorer(list(ROUGE.values()), use_stemmer=False)


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU()


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
