"""What has come of a sweep: the files beside its jobs, what is printed, and the exit code."""

import contextlib
import csv
import io
import json
import logging
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, sweep_job

from gpt.errors import UserError
from gpt.sweeps import jobs, summary

FILES = {"leaderboard.md", "leaderboard.csv", "sweep.csv", "curves.png", "heatmap.png", "report.html"}
COMMAND = ["python", "train.py", "-m", "optimizer.lr=1e-3,3e-3", "seed=1,2", "data.path=a b.txt", "sweep.name=mixed"]


def settings(lr, context, seed):
    return {"optimizer.lr": lr, "model.context_length": context, "seed": seed}


def grid(directory, **last):
    """Eight jobs: two learning rates, two context lengths, two seeds; `last` is the status of the last one."""
    every = [(lr, context, seed) for lr in (0.001, 0.003) for context in (64, 128) for seed in (1, 2)]
    directory.mkdir()
    (directory / "sweep.json").write_text(json.dumps({"format": 2, "name": directory.name, "command": COMMAND}))
    for number, (lr, context, seed) in enumerate(every):
        end = 4.0 + 100 * (lr - 0.001) + context / 1000 + seed / 1000
        fields = last if number == len(every) - 1 else {}
        sweep_job(directory, number, settings(lr, context, seed), [9.0, 5.0, end], fingerprint="f", **fields)
    return directory


def close(directory, columns=160):
    """(exit code, lines printed, warnings)"""
    output, warnings = io.StringIO(), []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("gpt")
    logger.addHandler(handler)
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        code = summary.close(directory)
    logger.removeHandler(handler)
    return code, output.getvalue().splitlines(), warnings


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A sweep in which all has happened that can."""
    directory = grid(tmp_path_factory.mktemp("sweeps") / "mixed")
    failed = {"status": "failed", "error": "loss nan\x1b[31m", "code": 4, "log": "/runs/train.log"}
    sweep_job(directory, 8, settings(0.01, 64, 1), [9.0], **failed)
    sweep_job(directory, 9, settings(0.02, 64, 1), [9.0, 8.5], status="halved")
    sweep_job(directory, 10, settings(0.03, 64, 1), [9.0, 8.0], status="running")  # of a process that has gone
    sweep_job(directory, 11, settings(0.04, 64, 1), [9.0, 7.0, 6.0], status="stopped")
    sweep_job(directory, 12, settings(0.05, 64, 1), status="new")
    damaged = sweep_job(directory, 13, settings(0.06, 64, 1), [9.0, 8.9])
    (damaged.folder / "job.json").write_text("{torn")
    (damaged.folder / "config.yaml").write_text("{optimizer: {lr: 0.06}, model: {context_length: 64}, seed: 1}")
    return directory


@pytest.fixture(scope="module")
def closed(mixed):
    return close(mixed)


def job_of(directory, lr):
    return jobs.name_of(settings(lr, 64, 1))


def test_the_result_is_in_files_beside_the_jobs(mixed, closed):
    assert {path.name for path in mixed.iterdir() if path.is_file()} == FILES | {"sweep.json"}
    for name in ("curves.png", "heatmap.png"):
        assert (mixed / name).read_bytes().startswith(b"\x89PNG")
    board = read_csv(mixed / "leaderboard.csv")
    assert [row["rank"] for row in board if row["rank"]] == ["1", "2", "3", "4"]
    assert (board[0]["optimizer.lr"], board[0]["model.context_length"]) == ("0.001", "64")
    assert float(board[0]["val/loss"]) == pytest.approx(4.0655)
    page = (mixed / "leaderboard.md").read_text()
    assert page.startswith(
        "# Sweep mixed\n\nThe best is optimizer.lr=0.001 model.context\\_length=64".replace("\\_", "_")
    )
    assert "## Failures" in page and "loss nan" in (mixed / "report.html").read_text()


def test_the_table_of_all_jobs_has_what_was_typed_and_what_came_of_it(mixed, closed):
    rows = read_csv(mixed / "sweep.csv")
    assert [row["status"] for row in rows] == ["completed"] * 8 + [
        "failed", "halved", "interrupted", "stopped", "new", "damaged",
    ]  # fmt: skip
    first, failed, new = rows[0], rows[8], rows[12]
    assert (first["job"], first["optimizer.lr"], first["seed"]) == (job_of(mixed, 0.001), "0.001", "1")
    assert (float(first["val/loss"]), float(first["val/bpb"])) == (pytest.approx(4.065), pytest.approx(2.0325))
    assert (first["tokens"], first["tokens_per_second"], first["seconds"]) == ("2000", "500.0", "10.0")
    assert (first["code"], first["error"]) == ("", "")
    assert (failed["code"], failed["error"]) == ("4", "loss nan\\x1b[31m")
    assert (new["val/loss"], new["tokens"]) == ("", "0")
    assert float(rows[13]["val/loss"]) == 8.9  # the metrics of the damaged one


def test_what_is_printed_is_the_table_the_verdict_each_failure_and_how_to_go_on(mixed, closed):
    code, lines, warnings = closed
    assert code == 1
    assert lines[0] == "" and lines[1].split()[:3] == ["optimizer.lr", "model.context_length", "status"]
    table = lines[2 : lines.index("", 1)]
    assert table[0].split()[:3] == ["0.001", "64", "completed"] and "4.066" in table[0]
    text = "\n".join(lines)
    assert "\nThe best is optimizer.lr=0.001 model.context_length=64: val/loss 4.0655 +- 0.0007, 2 seeds." in text
    assert "\x1b" not in text
    name = f"job {job_of(mixed, 0.01)} (optimizer.lr=0.01 model.context_length=64 seed=1)"
    assert f"{name} failed: loss nan\\x1b[31m; log: /runs/train.log" in lines
    killed, new, damaged = (job_of(mixed, lr) for lr in (0.03, 0.05, 0.06))
    folders = {job: mixed / job for job in (killed, new, damaged)}
    assert any(line.endswith(f"it was interrupted or killed; log: {folders[killed]}") for line in lines)
    assert any(line.endswith(f"has not begun; log: {folders[new]}") for line in lines)
    assert f"job {damaged} has a damaged job.json; log: {folders[damaged]}" in lines
    assert f"4 of 14 jobs are not done; to go on: {shlex.join(COMMAND)}" in lines
    assert lines[-1] == str(mixed)
    assert warnings == [f"{folders[damaged] / 'job.json'} is damaged; the job is known by its other files"]
    for lr in (0.02, 0.04):  # halved and stopped, as somebody has wanted it
        assert not any(line.startswith(f"job {job_of(mixed, lr)}") for line in lines)


def test_in_a_narrow_terminal_the_table_fits_and_the_result_stays(mixed, closed):
    code, lines, _ = close(mixed, columns=60)
    wide, narrow = (printed[1 : printed.index("", 1)] for printed in (closed[1], lines))
    assert len(wide) == len(narrow) and max(map(len, narrow)) <= 60 < max(map(len, wide)) <= 160
    assert "4.066" in narrow[1] and code == 1
    assert narrow[0].split()[:2] == ["lr", "context_length"] and ".." not in narrow[0]  # whole words, fewer columns
    prose = lines[lines.index("", 1) + 1 : next(i for i, line in enumerate(lines) if line.startswith("best job: "))]
    assert max(map(len, prose)) <= 60 and " ".join(prose) in " ".join(closed[1])  # broken between words only
    best = [job for job in jobs.read(mixed) if job.val_loss and job.setting("optimizer.lr") == 0.001]
    folder = min(best, key=lambda job: job.val_loss).folder
    assert f"best job: {folder}" in lines
    script = ROOT / "generate.py" if Path.cwd() != ROOT else "generate.py"
    command = f'python {script} checkpoint={folder} prompt="..."'
    assert f"generate from it: {command}" in lines
    for name in ("leaderboard.md", "report.html"):
        assert command.replace('"', "&#34;" if name.endswith("html") else '"') in (mixed / name).read_text()


def test_closing_again_says_the_same_and_leaves_the_jobs_alone(mixed, closed):
    before = {path: path.read_bytes() for path in sorted(mixed.rglob("*")) if path.is_file()}
    assert close(mixed) == closed
    assert {path: path.read_bytes() for path in sorted(mixed.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("status", "code"),
    [("completed", 0), ("halved", 0), ("stopped", 0), ("failed", 1), ("running", 1), ("paused", 1), ("new", 1)],
)
def test_the_exit_code_says_whether_all_has_come_to_an_end_that_somebody_wanted(tmp_path, monkeypatch, status, code):
    directory = tmp_path / "sweep"
    monkeypatch.setattr(summary.figures, "curves", lambda *arguments: None)  # 1 s of matplotlib each
    monkeypatch.setattr(summary.figures, "heatmap", lambda *arguments: None)
    assert close(grid(directory, status=status))[0] == code
    assert ("jobs are not done" in "\n".join(close(directory)[1])) == bool(code)


def test_without_any_loss_there_is_a_table_and_no_figure(tmp_path):
    directory = tmp_path / "sweep"
    for number in range(2):
        sweep_job(directory, number, {"seed": number}, status="failed", error="no", log="l")
    (directory / "sweep.json").write_text("{}")
    code, lines, warnings = close(directory)
    assert code == 1 and {path.name for path in directory.iterdir() if path.is_file()} == (
        FILES | {"sweep.json"}
    ) - {"curves.png", "heatmap.png"}  # fmt: skip
    assert "No job has come to its end with a val/loss: there is no best yet." in lines
    again = f"python {ROOT / 'train.py'} -m sweep.name=sweep"
    assert f"2 of 2 jobs are not done; to go on: {again}" in lines
    assert warnings == [f"{directory / 'sweep.json'} cannot be read: the command that started the sweep is not known"]


def test_what_cannot_be_written_is_a_warning_each_and_the_result_is_printed_all_the_same(tmp_path):
    directory = grid(tmp_path / "sweep")
    for name in FILES:
        (directory / name / "in the way").mkdir(parents=True)
    code, lines, warnings = close(directory)
    assert code == 0 and lines[-1] == str(directory)
    assert any(line.startswith("The best is optimizer.lr=0.001") for line in lines)
    assert sorted(warnings) == sorted(f"{directory / name} cannot be written (Is a directory)" for name in FILES)
    assert {path.name for path in directory.iterdir()} - {job.id for job in jobs.read(directory)} == FILES | {
        "sweep.json"
    }  # nothing temporary is left


def test_where_there_is_no_sweep_those_that_there_are_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "a" / "b"):
        with pytest.raises(UserError) as caught:
            summary.close(directory)
        assert str(caught.value) == f"there is no sweep ({directory}); there are: none" and caught.value.code == 2
    for name in ("second", "first"):
        grid(tmp_path / name)
    with pytest.raises(UserError, match=r"there are: first, second$"):
        summary.close(tmp_path / "frist")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "frist").exists()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"command": null}', '{"command": [1]}', "[" * 100_000, '{"command": "x y"}', "\udcff",
     '{"command": {"a": "b"}}'],
)  # fmt: skip
def test_when_the_command_is_not_known_there_is_one_that_names_the_sweep(tmp_path, caplog, content):
    (tmp_path / "sweep.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    assert summary.command(tmp_path) == f"python {ROOT / 'train.py'} -m sweep.name={tmp_path.name}"
    assert len(caplog.records) == 1


def test_the_command_can_be_pasted_into_a_shell_and_is_that_of_this_folder_also_of_a_copied_one(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"command": COMMAND}))
    command = summary.command(tmp_path)
    assert shlex.split(command)[:-1] == COMMAND[:-1] and "'data.path=a b.txt'" in command
    assert command.endswith(f" sweep.name={tmp_path.name}")  # a copy of the sweep in COMMAND
