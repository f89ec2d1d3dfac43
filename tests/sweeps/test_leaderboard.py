"""The leaderboard of a sweep: what is best, by how much, and whether that is more than chance."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import scipy.stats
from conftest import sweep_job

from gpt.evaluation import headlines
from gpt.sweeps import jobs, leaderboard, tables
from gpt.sweeps.jobs import Job


def job(number, loss, *overrides, seed=1337, status="completed", tokens=1000, config=(), **fields):
    """A job as gpt/sweeps/jobs.py reads it. `overrides`: as typed, numbers resolved into its settings, words not."""
    settings = {"seed": seed, "train.eval_tokens": 4096, "data.mask": "response", **dict(config)}
    typed = [*overrides, f"seed={seed}"]
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key:
            settings[key] = {"true": True, "false": False, "null": None}.get(value) if value.isalpha() else float(value)
    rows = [] if loss is None else [{"step": 9, "tokens": tokens, "val/loss": loss, "val/bpb": loss / 3}]
    rows += [{"step": 10, "tokens": tokens, "tokens_per_second": 100.0 + number}]
    fields = {"seconds": 10.0, "fingerprint": "f"} | fields
    return Job(Path(f"sweep/{number:08x}"), number, typed, settings, status=status, rows=rows, **fields)


def seeded(losses, *overrides, first=0, **fields):
    """One job for each loss, each with a seed of its own."""
    return [job(first + i, loss, *overrides, seed=i, **fields) for i, loss in enumerate(losses)]


THREE = [
    *seeded([4.0, 4.2], "optimizer.lr=0.001"),
    *seeded([4.4, 4.8], "optimizer.lr=0.003", first=2),
    *seeded([5.0, 5.2], "optimizer.lr=0.01", first=4),
]


def test_jobs_that_differ_in_the_seed_only_are_one_entry_and_the_lowest_mean_comes_first():
    found = leaderboard.entries(list(reversed(THREE)))
    assert [entry.settings for entry in found] == [{"optimizer.lr": lr} for lr in (0.001, 0.003, 0.01)]
    assert [sorted(j.number for j in entry.jobs) for entry in found] == [[0, 1], [2, 3], [4, 5]]
    assert {entry.status for entry in found} == {"completed"}


def test_mean_deviation_and_interval_are_those_worked_out_by_hand():
    entry = leaderboard.entries(THREE)[0]
    assert entry.mean == pytest.approx(4.1)
    assert entry.std == pytest.approx(math.sqrt(0.1**2 + 0.1**2))  # n - 1 = 1 below the sum of squares
    # t of one degree of freedom is the Cauchy distribution: its 97.5 % quantile is tan(0.475 pi) = 12.706
    half = math.tan(0.475 * math.pi) * entry.std / math.sqrt(2)
    assert (entry.low, entry.high) == (pytest.approx(4.1 - half), pytest.approx(4.1 + half))
    assert entry.bpb == pytest.approx(4.1 / 3)
    assert (entry.tokens, entry.seconds, entry.tokens_per_second) == (1000, 20.0, 100.5)


@pytest.mark.parametrize(("dof", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042)])
def test_quantiles_are_those_of_printed_tables(dof, printed):
    assert leaderboard.t_quantile(dof) == pytest.approx(printed, abs=5e-4)


def test_the_interval_of_three_seeds_covers_the_true_mean_19_times_in_20(record_property):
    rng, covered = random.Random(1), 0
    for _ in range(600):
        [entry] = leaderboard.entries(seeded([rng.gauss(4, 0.1) for _ in range(3)]))
        covered += entry.low <= 4 <= entry.high
    record_property("count", f"600 samples of 3 seeds: the 95 % interval of the mean covered it {covered} times")
    assert 0.92 < covered / 600 < 0.98  # 95 % +- 3 standard deviations


def test_seeds_may_be_missing_for_some_settings():
    jobs = [*seeded([4.0, 4.2, 4.1], "optimizer.lr=0.001"), job(7, 4.5, "optimizer.lr=0.01")]
    first, second = leaderboard.entries(jobs)
    assert (len(first.jobs), len(second.jobs)) == (3, 1)
    assert (second.mean, second.std, second.low, second.high) == (4.5, None, None, None)


def test_only_completed_jobs_count_where_there_are_any():
    jobs = [
        *seeded([4.0, 4.2], "optimizer.lr=0.001"),
        job(2, 3.0, "optimizer.lr=0.001", seed=2, status="failed", tokens=50),
    ]
    [entry] = leaderboard.entries(jobs)
    assert (entry.mean, entry.tokens) == (pytest.approx(4.1), 1000)
    assert entry.seconds == 30  # what the failed one took was spent all the same
    assert entry.status == "2 completed, 1 failed"


def test_what_did_not_end_shows_its_loss_after_all_that_did_and_without_a_loss_comes_last():
    jobs = [
        job(0, 9.0, "optimizer.lr=0.1"),
        job(1, 3.0, "optimizer.lr=0.2", status="halved", tokens=51_200),
        job(2, None, "optimizer.lr=0.3", status="new"),
        job(3, 2.0, "optimizer.lr=0.4", status="running", tokens=400),
        job(4, math.nan, "optimizer.lr=0.5"),
        job(5, math.inf, "optimizer.lr=0.6"),
        job(6, None, "optimizer.lr=0.7", status="failed"),
    ]
    found = leaderboard.entries(jobs)
    assert [entry.settings["optimizer.lr"] for entry in found] == [0.1, 0.4, 0.2, 0.3, 0.5, 0.6, 0.7]
    assert [entry.mean for entry in found] == [9.0, 2.0, 3.0, None, None, None, None]
    assert [entry.status for entry in found] == [
        "completed", "running at 400 tokens", "halved at 51,200 tokens", "new",
        "completed, 1 without a val/loss", "completed, 1 without a val/loss", "failed",
    ]  # fmt: skip
    assert found[0].losses == [9.0] and not any(entry.losses for entry in found[1:])


def test_losses_of_different_stages_get_no_deviation():
    [entry] = leaderboard.entries(seeded([4.0, 4.2], status="halved"))
    assert (entry.mean, entry.std, entry.low) == (pytest.approx(4.1), None, None)
    assert leaderboard.entries(seeded([4.0, 4.2], status="halved"))[0].status == "halved at 1,000 tokens"


def test_a_status_counts_and_gives_the_range_of_tokens():
    jobs = [job(i, 4.0, seed=i, status="halved", tokens=(i + 1) * 1000) for i in range(2)]
    jobs += [job(2, 4.0, seed=2), job(3, None, seed=3, status="new")]
    assert leaderboard.entries(jobs)[0].status == "1 completed, 2 halved at 1,000 to 2,000 tokens, 1 new"


def test_words_nothing_and_truth_values_are_axes_as_well():
    jobs = [
        job(0, 4.0, "model=mini", "train.grad_clip=null", "train.compile=true"),
        job(1, 4.1, "model=tiny", "train.grad_clip=null", "train.compile=true"),
        job(2, 4.2, "model=mini", "train.grad_clip=1", "train.compile=true"),
        job(3, 4.3, "model=mini", "train.grad_clip=null", "train.compile=false"),
    ]
    found = leaderboard.entries(jobs)
    assert list(found[0].settings.values()) == ["mini", None, True]
    assert "The best is model=mini train.grad_clip=null train.compile=true: " in leaderboard.verdict(found)


def test_the_best_job_of_a_folder_is_the_best_seed_of_the_best_settings_that_came_to_their_end(tmp_path):
    assert leaderboard.best_job(tmp_path) is None and leaderboard.best_job(tmp_path / "nowhere") is None
    for number, (lr, seed, loss) in enumerate([(1, 1, 4.0), (1, 2, 4.2), (2, 1, 3.9), (2, 2, 9.0)]):
        sweep_job(tmp_path, number, {"optimizer.lr": lr, "seed": seed}, [9.5, loss])
    sweep_job(tmp_path, 9, {"optimizer.lr": 3, "seed": 1}, [9.5, 1.0], status="interrupted")
    best = leaderboard.best_job(tmp_path)
    assert (best.setting("optimizer.lr"), best.setting("seed"), best.folder.parent) == (1, 1, tmp_path)


def test_nothing_at_all_is_a_leaderboard_too():
    assert leaderboard.entries([]) == []
    assert "no best yet" in leaderboard.verdict([])
    assert leaderboard.caveats([]) == []


def test_welchs_test_agrees_with_a_calculation_by_hand_and_with_scipy():
    found = leaderboard.welch([4.0, 4.2], [4.4, 4.8])
    # variances of the means 0.02 / 2 and 0.08 / 2; degrees of freedom 0.05^2 / (0.01^2 + 0.04^2) = 25 / 17
    error, dof = math.sqrt(0.05), 25 / 17
    half = scipy.stats.t.ppf(0.975, dof) * error
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half, 2 * scipy.stats.t.sf(0.5 / error, dof)))
    rng = random.Random(2)
    for _ in range(20):
        first = [rng.gauss(4, 0.1) for _ in range(rng.randint(2, 6))]
        second = [rng.gauss(4.1, 0.3) for _ in range(rng.randint(2, 6))]
        test = scipy.stats.ttest_ind(second, first, equal_var=False)
        low, high = test.confidence_interval(0.95)
        assert leaderboard.welch(first, second)[1:] == pytest.approx((low, high, test.pvalue), rel=1e-9)


@pytest.mark.parametrize(("settings", "seeds"), [(2, 3), (2, 6), (6, 3)])
def test_the_best_of_equals_is_called_distinguishable_once_in_20_at_most(settings, seeds, record_property):
    rng, called = random.Random(3), 0
    for _ in range(400):
        groups = [[rng.gauss(4, 0.1) for _ in range(seeds)] for _ in range(settings)]
        jobs = [j for i, losses in enumerate(groups) for j in seeded(losses, f"optimizer.lr=0.{i + 1}")]
        text = leaderboard.verdict(leaderboard.entries(jobs))
        assert ("It is distinguishable" in text) != ("It is not distinguishable" in text), text
        called += "It is distinguishable" in text
    record_property("count", f"400 sweeps of {settings} equal settings, {seeds} seeds: {called} false claims of a best")
    assert called / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_a_large_difference_is_found():
    jobs = seeded([4.0, 4.01, 4.02], "optimizer.lr=0.001") + seeded([5.0, 5.01, 5.02], "optimizer.lr=0.01", first=3)
    text = leaderboard.verdict(leaderboard.entries(jobs))
    assert text == (
        "The best is optimizer.lr=0.001: val/loss 4.0100 +- 0.0100, 3 seeds. It is distinguishable from the next, "
        "optimizer.lr=0.01 (5.0100 +- 0.0100, 3 seeds): the difference is 1.0000, 95 % interval 0.9773 to 1.0227 "
        "(Welch's t test, p below 0.0001)."
    )


@pytest.mark.parametrize(("gap", "words"), [(0.225, "is not disting"), (0.23, "is disting")])
def test_the_line_is_drawn_at_5_percent(gap, words):
    losses = [3.9, 4.0, 4.1]
    # both deviations are 0.1, so t = gap / (0.1 sqrt(2 / 3)) with 4 degrees of freedom, whose quantile is 2.776
    assert (gap / (0.1 * math.sqrt(2 / 3)) > 2.776) == (words == "is disting")
    jobs = seeded(losses, "optimizer.lr=0.1") + seeded([x + gap for x in losses], "optimizer.lr=0.2", first=3)
    assert f"It {words}" in leaderboard.verdict(leaderboard.entries(jobs))


def test_two_seeds_are_tested_and_called_weak():
    text = leaderboard.verdict(leaderboard.entries(THREE))
    p = scipy.stats.ttest_ind([4.0, 4.2], [4.4, 4.8], equal_var=False).pvalue
    assert "It is not distinguishable from the next, optimizer.lr=0.003 (4.6000 +- 0.2828, 2 seeds)" in text
    assert f"(Welch's t test, p = {p:.2g}; two seeds are a weak test)" in text


@pytest.mark.parametrize("n", [1, 3])
def test_with_one_seed_of_either_it_cannot_be_told(n):
    jobs = [*seeded([4.0, 4.1, 4.2][:n], "optimizer.lr=0.001"), job(9, 4.3, "optimizer.lr=0.01")]
    text = leaderboard.verdict(leaderboard.entries(jobs))
    assert "cannot be told from one seed" in text and "distinguishable" not in text


def test_the_verdict_says_how_many_seeds_are_missing_and_when_there_is_nothing_to_compare():
    jobs = [*seeded([4.0, 4.2], "optimizer.lr=0.001"), job(2, 3.0, "optimizer.lr=0.001", seed=2, status="failed")]
    jobs += [job(3, 1.0, "optimizer.lr=0.1", status="interrupted")]
    text = leaderboard.verdict(leaderboard.entries(jobs))
    assert text.startswith("The best is optimizer.lr=0.001: val/loss 4.1000 +- 0.1414, 2 of 3 seeds. No other settings")
    assert "there is no best yet" in leaderboard.verdict(leaderboard.entries(jobs[3:]))
    assert "The best is the only setting: val/loss 4.0000, 1 seed." in leaderboard.verdict(
        leaderboard.entries([job(0, 4.0)])
    )


def test_losses_without_any_spread_are_not_tested():
    jobs = seeded([4.0, 4.0], "optimizer.lr=0.001") + seeded([4.1, 4.1], "optimizer.lr=0.01", first=2)
    assert "without any spread there is no test" in leaderboard.verdict(leaderboard.entries(jobs))
    jobs = seeded([4.0, 4.0], "optimizer.lr=0.001") + seeded([4.1, 4.2], "optimizer.lr=0.01", first=2)
    assert "p = " in leaderboard.verdict(leaderboard.entries(jobs))


def test_a_fair_comparison_has_no_caveats():
    assert leaderboard.caveats(THREE) == []
    close = [job(0, 4.0, tokens=1000), job(1, 4.0, tokens=1020), job(2, 4.0, tokens=10, status="halved")]
    assert leaderboard.caveats(close) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "g"}, "prepared data differs, 2 on that of 00000000; 1 on that of 00000002:"),
        ({"config": {"data.mask": "all"}}, r"data\.mask differs \(response, all\)"),
        ({"config": {"train.eval_tokens": 100}}, r"train\.eval_tokens differs \(4096, 100\)"),
        ({"config": {"data.tokenizer": "bytes"}}, "compare val/bpb"),
        ({"config": {"data.template": "plain"}}, "data.template differs"),
        ({"tokens": 1021}, "more than 2 % .1,000 to 1,021 tokens"),
    ],
)
def test_what_makes_losses_incomparable_is_named(changes, words):
    base = {"data.tokenizer": "gpt2", "data.template": "alpaca"}
    jobs = seeded([4.0, 4.1], config=base)
    jobs.append(job(2, 4.0, seed=9, **{**changes, "config": base | changes.get("config", {})}))
    [caveat] = leaderboard.caveats(jobs)
    assert re.search(words, caveat)
    assert leaderboard.caveats([*jobs[:2], job(3, None, seed=9, **changes)]) == []  # without a loss, nothing to compare


LOSSES = [3.0, 3.1, 3.2, 3.3, 3.4, 3.5]


def scored_sweep(tmp_path, scores, **changes):
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
    [said] = leaderboard.agreement(scored_sweep(tmp_path, scores))
    value = scipy.stats.spearmanr(LOSSES, scores).statistic
    assert said.startswith(f"Rank correlation of val/loss and answers_test ROUGE-L over 6 jobs: {value:.4g} [")
    assert said.endswith(meaning)


def test_too_few_jobs_jobs_that_have_not_ended_and_other_data_have_none(tmp_path):
    assert leaderboard.agreement(scored_sweep(tmp_path / "a", [0.9] * 6)) == []  # nothing to rank
    assert leaderboard.agreement(scored_sweep(tmp_path / "b", [6, 5, 4, 3, 2, 1], status="interrupted")) == []
    found = scored_sweep(tmp_path / "c", [6, 5, 4, 3, 2, 1])
    assert leaderboard.agreement(found[:3]) == []
    assert len(leaderboard.agreement(found)) == 1


def test_it_is_said_in_the_leaderboards_file(tmp_path):
    found = scored_sweep(tmp_path, [6, 5, 4, 3, 2, 1])
    results = leaderboard.Results(tmp_path, found, leaderboard.entries(found), "verdict", [], [], [], "command")
    assert "## Loss and scores\n\n- Rank correlation of val/loss and answers_test ROUGE-L" in tables.markdown(results)
