"""Whether the lowest loss also answers best."""

import json

import pytest
from conftest import sweep_job
from scipy import stats

from gpt.evaluation import headlines
from gpt.sweeps import agreement, jobs, leaderboard, tables
from gpt.sweeps.leaderboard import Results

LOSSES = [3.0, 3.1, 3.2, 3.3, 3.4, 3.5]


def sweep(tmp_path, scores, **changes):
    """Jobs with a loss and a score each."""
    for i, (loss, score) in enumerate(zip(LOSSES, scores, strict=True)):
        job = sweep_job(tmp_path, i, {"optimizer.lr": i + 1}, [loss], **changes)
        path = job.folder / headlines.FOLDER / "answers_test_step_00000000.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"headline": "ROUGE-L", "figures": {"model": {"ROUGE-L": {"value": score}}}}))
    return jobs.read(tmp_path)


@pytest.mark.parametrize(
    ("scores", "meaning"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], "a lower loss goes with a higher answers_test ROUGE-L."),
        ([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "a lower loss goes with a lower answers_test ROUGE-L."),
        ([0.4, 0.9, 0.5, 0.8, 0.6, 0.7], "the loss does not tell which job has the best."),
    ],
)
def test_the_rank_correlation_is_spearmans_and_says_what_it_means(tmp_path, scores, meaning):
    [said] = agreement.sentences(sweep(tmp_path, scores))
    value = stats.spearmanr(LOSSES, scores).statistic
    assert said.startswith(f"Rank correlation of val/loss and answers_test ROUGE-L over 6 jobs: {value:.4g} [")
    assert said.endswith(meaning)


def test_too_few_jobs_jobs_that_have_not_ended_and_other_data_have_none(tmp_path):
    assert agreement.sentences(sweep(tmp_path / "a", [0.9] * 6)) == []  # nothing to rank
    assert agreement.sentences(sweep(tmp_path / "b", [6, 5, 4, 3, 2, 1], status="interrupted")) == []
    found = sweep(tmp_path / "c", [6, 5, 4, 3, 2, 1])
    assert agreement.sentences(found[:3]) == []
    assert len(agreement.sentences(found)) == 1


def test_it_is_said_in_the_leaderboards_file(tmp_path):
    found = sweep(tmp_path, [6, 5, 4, 3, 2, 1])
    results = Results(tmp_path, found, leaderboard.entries(found), "verdict", [], [], [], "command")
    assert "## Loss and scores\n\n- Rank correlation of val/loss and answers_test ROUGE-L" in tables.markdown(results)
