"""The tables of a sweep: what they have in each column, and that nothing in them is anything but text."""

import csv
import io
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

from conftest import sweep_job
from test_leaderboard import THREE, job, seeded

from gpt.sweeps import jobs, leaderboard, tables
from gpt.sweeps.leaderboard import Results
from gpt.terminal import console


def results(name, entries, verdict="v", caveats=(), predictions=(), failures=()):
    return Results(Path(name), [], entries, verdict, caveats, predictions, failures, "python train.py -m")


def test_nothing_at_all_has_tables_too():
    assert tables.entries_csv([]).count("\n") == tables.jobs_csv([]).count("\n") == 1
    assert tables.markdown(results("empty", [])).startswith("# Sweep empty\n")
    assert tables.columns([]) == ["status", "val/loss", "val/bpb", "tokens", "tokens/s", "seconds", "folder"]
    assert tables.rows([]) == [] and tables.grid([]) is None


def test_the_csv_has_all_digits_and_reads_back():
    jobs = [
        *seeded([4.0, 4.2], "optimizer.lr=0.00031622776601683794"),
        job(5, None, "optimizer.lr=1e-05", status="new"),
    ]
    first, second = csv.DictReader(io.StringIO(tables.entries_csv(leaderboard.entries(jobs))))
    assert float(first["optimizer.lr"]) == 0.00031622776601683794
    assert float(first["val/loss"]) == statistics.fmean([4.0, 4.2]) and float(first["std"]) > 0
    assert (first["rank"], first["seeds"], first["tokens"], first["status"]) == ("1", "2", "1000", "completed")
    assert first["jobs"].split() == ["00000000", "00000001"]
    assert (second["rank"], second["val/loss"], second["std"], second["seeds"], second["status"]) == (
        "",
        "",
        "",
        "0",
        "new",
    )


def test_the_page_has_varied_keys_only_and_everything_beside_the_table():
    found = leaderboard.entries(THREE)
    page = tables.markdown(results("first", found, "A verdict.", ["A caveat."], ["a prediction"], ["job 7 failed"]))
    assert page.splitlines()[:7] == [
        "# Sweep first",
        "",
        "A verdict.",
        "",
        "|  | optimizer.lr | val/loss | 95 % interval | seeds | val/bpb | tokens | time | tokens/s | folder | status |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 0.001 | 4.1000 +- 0.1414 | 2.8294 to 5.3706 | 2 | 1.3667 | 1,000 | 20 s | 100 | 00000000 | completed |",
    ]
    for part in (
        "## Not comparable\n\n- A caveat.\n",
        "## Predicted best\n\n- a prediction\n",
        "## Failures\n\n- job 7 failed\n",
    ):
        assert part in page
    assert "##" not in tables.markdown(results("x", found))


EVIL = "a|b\n<img src=x>`[link](http://x)\x1b[31m\u202e*"


def test_nothing_in_a_setting_or_a_failure_is_markup_or_moves_the_cursor():
    jobs = [job(0, 4.0, f"model={EVIL}", f"{EVIL}=1"), job(1, 4.1, "model=mini", f"{EVIL}=2")]
    found = leaderboard.entries(jobs)
    page = tables.markdown(results(EVIL.replace("/", "|"), found, leaderboard.verdict(found), [EVIL], [EVIL], [EVIL]))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {13}  # twelve cells each
    assert not re.search(r"(?<!\\)[<`\[*]", page)
    for text in (page, tables.entries_csv(found), leaderboard.verdict(found)):
        assert not set(text) & {"\x1b", "\u202e"}
    shown = console.table(tables.rows(found), tables.columns(found))
    assert not set(shown) & {"\x1b", "\u202e"} and len(shown.splitlines()) == 3


def test_the_closing_table_has_a_line_for_each_entry(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    found = leaderboard.entries([*THREE, job(9, None, "optimizer.lr=1", status="new")])
    lines = console.table(tables.rows(found), tables.columns(found)).splitlines()
    assert lines[0].split() == [
        "optimizer.lr", "status", "val/loss", "std", "seeds", "val/bpb", "tokens", "tokens/s", "seconds", "folder",
    ]  # fmt: skip
    assert lines[1].split() == [
        "0.001", "completed", "4.100", "0.1414", "2", "1.367", "1,000", "100.5", "20", "00000000",
    ]  # fmt: skip
    assert len(lines) == 5
    single = leaderboard.entries([job(0, 4.0, "optimizer.lr=1"), job(1, 4.1, "optimizer.lr=2")])
    assert "std" not in tables.columns(single)


def test_words_nothing_and_truth_values_are_shown_as_one_types_them():
    jobs = [job(0, 4.0, "train.compile=true", "train.grad_clip=null"), job(1, 5.0, "train.compile=false")]
    row = tables.rows(leaderboard.entries(jobs))[0]
    assert row["train.compile"] == "true"


def test_two_varied_settings_make_a_grid_with_values_in_order():
    pairs = [(lr, context) for lr in (0.003, 0.0003, 0.001) for context in (128, 64)]
    jobs = [
        job(i, 4 + abs(math.log10(lr) + 3) + 6.4 / context, f"optimizer.lr={lr}", f"model.context_length={context}")
        for i, (lr, context) in enumerate(pairs)
    ]
    grid = tables.grid(leaderboard.entries(jobs))
    assert grid.keys == ("optimizer.lr", "model.context_length")
    assert (grid.rows, grid.columns) == (["0.0003", "0.001", "0.003"], ["64", "128"])
    assert grid.best == (1, 1) and not grid.unfinished
    assert grid.losses[1][1] == min(map(min, grid.losses))
    halved = [replace(one, status="halved") if one.setting("optimizer.lr") == 3e-3 else one for one in jobs]
    assert tables.grid(leaderboard.entries(halved)).unfinished == {(2, 0), (2, 1)}
    # texts come after numbers, and a cell of jobs without a loss is empty
    others = [job(8, None, "optimizer.lr=abc", "model.context_length=64", status="new", config={"optimizer.lr": "abc"})]
    others.append(job(9, 9.0, "optimizer.lr=0.1", "model.context_length=64"))
    mixed = tables.grid(leaderboard.entries([*jobs, *others]))
    assert mixed.rows == ["0.0003", "0.001", "0.003", "0.1", "null"] and math.isnan(mixed.losses[4][0])
    one_axis = [one for one in jobs if one.setting("model.context_length") == 64]
    assert tables.grid(leaderboard.entries(one_axis)) is None


def test_headline_figures_of_evaluations_are_columns_beside_the_loss(tmp_path):
    for i, (lr, rouge) in enumerate([(0.1, 0.25), (0.2, None)]):
        job = sweep_job(tmp_path, i, {"optimizer.lr": lr}, [3.0, 2.0])
        if rouge is not None:
            content = {"headline": "ROUGE-L", "figures": {"model": {"ROUGE-L": {"value": rouge}}}}
            (job.folder / "evaluations").mkdir()
            (job.folder / "evaluations" / "answers_test_step_00000010.json").write_text(json.dumps(content))
            (job.folder / "evaluations" / "answers_test_step_00000000.json").write_text(json.dumps(content))
            (job.folder / "evaluations" / "damaged_step_00000010.json").write_text("{")
    found = leaderboard.entries(jobs.read(tmp_path))
    name = "answers_test ROUGE-L"
    assert found[0].scores == {name: 0.25} and found[1].scores == {}
    assert name in tables.columns(found) and tables.rows(found)[0][name] == 0.25
    lines = [line.split(",") for line in tables.entries_csv(found).splitlines()]
    place = lines[0].index(name)
    assert (lines[1][place], lines[2][place]) == ("0.25", "")
    page = tables.markdown(results("first", found))
    assert f"| val/bpb | {name} | tokens |" in page and "| 1.0000 | 0.25 |" in page
