"""Sweeps of a small Hydra application, run as a person runs them: what is printed, what is left on disk."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt import sweep
from gpt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

CONFIG = f"""
defaults:
  - _self_
  - override hydra/callbacks: sweep
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
lr: 1.0
context: 128
hydra:
  output_subdir: null
  searchpath: ["file://{ROOT}/conf"]
  run: {{dir: out/run}}
  sweep: {{dir: out/first, subdir: "${{hydra.job.num}}"}}
"""

APPLICATION = f"""
import json, sys, weakref
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import hydra
from hydra.core.hydra_config import HydraConfig
from gpt import config, console
from gpt.errors import UserError

models = []  # weak references to the models of failed jobs

class Model:
    pass

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    console.setup()
    if models:
        console.say(f"models in memory: {{sum(model() is not None for model in models)}}")
    folder = Path(HydraConfig.get().runtime.output_dir)
    loss = round(cfg.lr + cfg.context / 1000, 3)
    rows = [{{"step": 0, "tokens": 0, "val/loss": 10.8, "val/bpb": 4.0}},
            {{"step": 1, "tokens": 2048, "train/loss": 9.0, "tokens_per_second": 500.0}},
            {{"step": 2, "tokens": 4096, "val/loss": loss, "val/bpb": loss / 3, "tokens_per_second": 700.0}},
            {{"step": 3, "tokens": 6144, "val/loss": loss + 1, "val/bpb": 9.0, "tokens_per_second": 900.0}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    if cfg.lr == 13:
        model = Model()
        models.append(weakref.ref(model))
        raise ValueError("unlucky\\nnumber")
    if cfg.lr == -1:
        raise UserError("lr -1 is not above 0", remedy="raise it", code=4)
    if cfg.lr == 99:
        raise KeyboardInterrupt
    return loss

config.launch(main, "train")
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "app.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APPLICATION)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "app.py", *arguments]
        env = os.environ | {"COLUMNS": "120"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=env)

    return run


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_ends_with_a_table_a_csv_a_figure_and_its_directory(app, tmp_path):
    done = app("-m", "lr=2,1", "context=128,256", "+note=fixed")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    directory = tmp_path / "out" / "first"
    lines = done.stdout.splitlines()
    assert lines[0] == "job 0: lr=2 context=128"
    table = [line.split() for line in lines[5:10]]
    assert table[0][:8] == ["job", "lr", "context", "status", "val/loss", "val/bpb", "tokens", "tokens/s"]
    assert table[4][:8] == ["3", "1", "256", "completed", "1.256", "0.4187", "6,144", "700"]
    assert lines[-1] == str(directory)

    rows = read_csv(directory / "sweep.csv")
    assert [(row["num"], row["lr"], row["context"], row["note"], row["val/loss"]) for row in rows] == [
        ("0", "2", "128", "fixed", "2.128"),
        ("1", "2", "256", "fixed", "2.256"),
        ("2", "1", "128", "fixed", "1.128"),
        ("3", "1", "256", "fixed", "1.256"),
    ]
    assert (directory / "comparison.png").read_bytes().startswith(b"\x89PNG")
    job = json.loads((directory / "2" / "job.json").read_text())
    assert 0 <= job.pop("seconds") < 30
    assert job == {
        "num": 2,
        "name": "lr=1 context=128",
        "overrides": ["lr=1", "context=128", "+note=fixed"],
        "status": "completed",
        "error": None,
        "code": 0,
        "value": 1.128,
        "log": None,
        "out_dir": str(directory / "2"),
    }
    assert not list(directory.rglob("*.tmp"))


def test_failed_jobs_are_reported_at_once_and_at_the_end_and_the_others_run(app, tmp_path):
    done = app("-m", "lr=13,-1,1")
    directory = tmp_path / "out" / "first"
    bug = f"job 0 (lr=13) failed: ValueError: unlucky number; log: {directory}/0/traceback.txt"
    mistake = f"job 1 (lr=-1) failed: lr -1 is not above 0; raise it; log: {directory}/1"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {bug}", f"error: {mistake}"]
    assert done.stdout.splitlines()[-3:] == [bug, mistake, str(directory)]
    assert [(row["num"], row["status"], row["code"]) for row in read_csv(directory / "sweep.csv")] == [
        ("0", "failed", "1"),
        ("1", "failed", "4"),
        ("2", "completed", "0"),
    ]
    assert "models[0]" not in (directory / "0" / "traceback.txt").read_text()
    assert 'raise ValueError("unlucky' in (directory / "0" / "traceback.txt").read_text()
    assert "models in memory: 0" in done.stdout  # Hydra keeps the exception, but not what its frames held


def test_an_interrupted_job_is_in_the_closing_table(app, tmp_path):
    done = app("-m", "lr=1,99,2")
    assert done.returncode != 0
    directory = tmp_path / "out" / "first"
    assert [row["status"] for row in read_csv(directory / "sweep.csv")] == ["completed", "unfinished"]
    assert done.stdout.splitlines()[-2:] == [
        f"job 1 (lr=99) did not end: it was interrupted or killed; log: {directory}/1",
        str(directory),
    ]
    assert "Traceback" not in done.stderr


def test_a_single_run_leaves_no_record_of_a_sweep(app, tmp_path):
    done = app("lr=3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "out" / "run").iterdir()] == ["metrics.jsonl"]


def test_damaged_records_are_left_out(tmp_path, caplog):
    good = {"num": 1, "overrides": ["lr=1"], "status": "completed"}
    for name, text in (("0", "{torn"), ("1", json.dumps(good)), ("2", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(text)
    (tmp_path / "1" / "metrics.jsonl").write_text(
        '{"step": 1, "tokens": 5, "val/loss": 2.0}\n{"step": 2, "tokens": 9, "val/loss": "NaN"}\n{"step": 3, "va'
    )
    (job,) = sweep.read_jobs(tmp_path)
    assert (job["num"], job["val/loss"], job["tokens"]) == (1, 2.0, 9)
    assert "job.json cannot be read" in caplog.text


def test_only_what_differs_between_jobs_is_a_column():
    jobs = [{"overrides": ["model=tiny", "lr=1", "+a=x=y"]}, {"overrides": ["model=tiny", "lr=2"]}]
    assert sweep.varied_keys(jobs) == ["lr", "a"]
    assert sweep.varied_keys(jobs[:1]) == []


def test_no_sweep_runs_in_a_process_that_did_not_start_one():
    assert not sweep.running()
    with pytest.raises(RuntimeError):
        sweep.close()


def test_user_errors_keep_their_text_and_bugs_name_their_type():
    assert sweep._explain(UserError("what", "where", "remedy")) == "what (where); remedy"
    assert sweep._explain(KeyError("key")) == "KeyError: 'key'"
