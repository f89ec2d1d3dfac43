"""Questions that share words with training data, and the scores of these and of the others."""

import json

import numpy as np
import pytest
from made_run import make, settings

import evaluate
from gpt.evaluation import contamination, statistics

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def rows(*spans):
    return [{"shared span": span, "in training": False} for span in spans]


def test_a_score_is_split_into_that_of_shared_questions_and_that_of_the_others():
    measure = statistics.mean([1.0, 0.0, 0.5, 0.25])
    found = contamination.split(rows(13, 12, 20, 0), {"score": measure})
    assert found[contamination.SHARED]["score"].total() == 0.75
    assert found[contamination.UNSHARED]["score"].total() == 0.125


@pytest.mark.parametrize("spans", [(13, 20), (0, 12), (None, None)])
def test_where_all_questions_are_of_one_kind_nothing_is_split(spans):
    assert contamination.split(rows(*spans), {"score": statistics.mean([1.0, 0.0])}) == {}


def test_the_interval_of_a_part_is_near_that_of_its_own_bootstrap():
    rng = np.random.default_rng(1)
    values, kept = rng.normal(size=400), rng.random(400) < 0.5
    part = statistics.figure(statistics.mean(values).where(kept), statistics.resamples(400, 4000, 2))
    alone = statistics.figure(statistics.mean(values[kept]), statistics.resamples(int(kept.sum()), 4000, 3))
    assert part.value == pytest.approx(alone.value)
    assert (part.low, part.high) == pytest.approx((alone.low, alone.high), abs=0.02)


def test_a_resample_without_any_question_of_a_part_says_nothing_about_it():
    part = statistics.mean([5.0] + [0.0] * 9).where(np.arange(10) == 0)
    assert statistics.figure(part, statistics.resamples(10, 500, 0)) == statistics.Figure(5.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("kind", "figure"),
    [("answers", "loss of the reference"), ("choice", "bits per byte of the right one"), ("loss", "loss")],
)
def test_every_kind_that_asks_questions_splits_its_scores(tmp_path, capsys, monkeypatch, kind, figure):
    run = make(tmp_path)
    known = json.loads((tmp_path / "data" / "train.jsonl").read_text().splitlines()[0])
    asked = [(known["instruction"], known["output"]), ("Is it new ?", LONG), ("Or ?", f"{LONG} x"), ("And ?", "short")]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in asked))
    monkeypatch.setattr(contamination, "CONTAMINATED", 10)  # no answer of this training split has 13 words
    evaluate.evaluate(settings(kind, checkpoint=str(run), file=str(path)))
    content = json.loads((run / "evaluations" / f"{kind}_step_00000003.json").read_text())
    systems = ("model", contamination.SHARED, contamination.UNSHARED)
    whole, shared, others = (content["figures"][name] for name in systems)
    assert whole.keys() == shared.keys() == others.keys()
    assert shared[figure]["value"] != whole[figure]["value"] != others[figure]["value"]
    assert "1 of 4 questions with their references share 10 or more words in a row" in content["remarks"][-1]
    assert contamination.SHARED in capsys.readouterr().out
