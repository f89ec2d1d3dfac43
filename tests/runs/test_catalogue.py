"""All runs below a folder are found, newest first, whatever else is there."""

import os

from gpt.runs import catalogue


def test_runs_and_jobs_are_found_newest_first_and_nothing_else_is(tmp_path):
    for age, name in enumerate(["runs/new", "sweeps/first/1a2b3c4d", "runs/group/old"]):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("")
        os.utime(tmp_path / name / "metrics.jsonl", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "killed" / "checkpoints").mkdir(parents=True)  # before its first row was on the disk
    for name in ("runs/foreign", "data/medquad", "runs/new/checkpoints/checkpoints", ".trash/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path)
    found = [str(run.relative_to(tmp_path)) for run in catalogue.newest_first(tmp_path)]
    assert found == ["runs/new", "sweeps/first/1a2b3c4d", "runs/group/old", "runs/killed"]
    assert catalogue.newest_first(tmp_path / "nowhere") == []


def test_a_folder_of_runs_may_be_a_link_and_each_run_is_listed_once(tmp_path):
    (tmp_path / "disk" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "again").symlink_to(tmp_path / "disk" / "mine")
    assert len(catalogue.newest_first(tmp_path / "outputs")) == 1
    (tmp_path / "disk" / "again").unlink()
    assert catalogue.newest_first(tmp_path / "outputs") == [tmp_path / "outputs" / "runs" / "mine"]
