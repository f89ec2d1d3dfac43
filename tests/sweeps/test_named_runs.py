"""checkpoint=latest is the newest run, and the folder of a sweep its best job."""

import json
import os

import pytest

from gpt.config import places
from gpt.errors import UserError
from gpt.sweeps import jobs, named_runs


def run(folder, written_at, loss=5.0):
    """A directory of a run that has a checkpoint, and has written its last row at this time."""
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "tokens": 9, "val/loss": loss}) + "\n")
    os.utime(metrics, (written_at, written_at))
    return folder


def job(sweep, name, number, loss, written_at=1, status="completed"):
    folder = run(sweep / name, written_at, loss)
    config = {"optimizer.lr": 0.1 * (1 + number)}
    jobs.write(jobs.Job(folder, number, [f"optimizer.lr={config['optimizer.lr']}"], config, status=status))
    return folder


def test_a_sweep_is_its_best_completed_job_and_not_the_first_by_name(tmp_path):
    job(tmp_path, "aaaaaaaa", 0, 3.0)
    best = job(tmp_path, "bbbbbbbb", 1, 2.0)
    job(tmp_path, "cccccccc", 2, 1.0, status="failed")
    assert named_runs.resolve(str(tmp_path)) == str(best)
    assert named_runs.resolve(str(best)) == str(best)
    assert named_runs.resolve("gpt2") == "gpt2"


def test_a_sweep_without_a_loss_has_no_best_job(tmp_path):
    job(tmp_path, "aaaaaaaa", 0, float("nan"))
    with pytest.raises(UserError, match="no job of the sweep has a val/loss yet") as error:
        named_runs.resolve(str(tmp_path))
    assert error.value.code == 3


def test_latest_is_the_run_or_sweep_that_has_written_metrics_last(tmp_path):
    with pytest.raises(UserError, match=r"there is no run yet .*; make one: python train.py"):
        named_runs.resolve("latest", tmp_path)
    run(tmp_path / "runs" / "b", 50)
    newer = run(tmp_path / "runs" / "a", 60)
    (tmp_path / "runs" / "refused").mkdir()
    run(tmp_path / "debug" / "c", 70)
    assert named_runs.resolve("latest", tmp_path) == str(newer)
    job(tmp_path / "sweeps" / "s", "aaaaaaaa", 0, 3.0, written_at=90)
    best = job(tmp_path / "sweeps" / "s", "bbbbbbbb", 1, 2.0, written_at=80)
    assert named_runs.resolve("latest", tmp_path) == str(best)


def test_latest_is_no_path_but_a_folder_of_that_name_can_be_named(tmp_path):
    assert places.absolute("checkpoint", "latest", tmp_path) == "latest"
    assert places.absolute("checkpoint", "./latest", tmp_path) == str(tmp_path / "latest")
