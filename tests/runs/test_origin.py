"""A directory that is copied is a new run; one that is moved is the run that it was."""

import json
import shutil

import pytest

from gpt.runs import origin
from gpt.runs.wandb_description import describe_run, describe_sweep
from gpt.sweeps.selection import place_of_jobs

from test_run_log import config  # isort: skip


def a_run(directory):
    directory.mkdir()
    origin.settle(directory)
    (directory / "wandb.json").write_text('{"id": "good1234"}')
    return origin.read(directory)


def test_a_copy_is_a_new_run_that_says_where_it_comes_from_and_the_original_stays_what_it_is(tmp_path, lines):
    record = a_run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for _ in range(2):
        origin.settle(tmp_path / "b")
        origin.settle(tmp_path / "a")
    copy = origin.read(tmp_path / "b")
    assert copy["id"] != record["id"] and copy["copied_from"] == str(tmp_path / "a")
    assert origin.read(tmp_path / "a") == record and (tmp_path / "a" / "wandb.json").exists()
    assert lines() == [f"copied from {tmp_path}/a: this is a new one from here on"]
    about = describe_run(config(), tmp_path / "b", resumed=True)
    assert about["id"] != "good1234" and about["notes"] == f"copied from {tmp_path}/a"
    assert describe_run(config(), tmp_path / "a", resumed=True)["id"] == "good1234"


@pytest.mark.parametrize("how", ["renamed", "the original is gone", "the original is another run now", "a link"])
def test_a_run_that_was_moved_goes_on_as_itself(tmp_path, lines, how):
    record = a_run(tmp_path / "a")
    if how == "a link":
        (tmp_path / "b").symlink_to(tmp_path / "a")
    else:
        (tmp_path / "a").rename(tmp_path / "b")
    if how == "the original is another run now":
        a_run(tmp_path / "a")
    origin.settle(tmp_path / "b")
    assert origin.read(tmp_path / "b")["id"] == record["id"] and lines() == []
    assert describe_run(config(), tmp_path / "b", resumed=True)["id"] == "good1234"


def test_a_copy_of_a_run_of_before_there_was_a_record_is_known_by_its_id_in_wandb(tmp_path):
    a_run(tmp_path / "a")
    (tmp_path / "a" / "run.json").unlink()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    origin.settle(tmp_path / "b", str(tmp_path / "a"))
    assert origin.read(tmp_path / "b")["copied_from"] == str(tmp_path / "a")
    assert not (tmp_path / "b" / "wandb.json").exists()
    origin.settle(tmp_path / "a", str(tmp_path / "a"))
    assert origin.read(tmp_path / "a")["copied_from"] is None and (tmp_path / "a" / "wandb.json").exists()


@pytest.mark.parametrize("has_record", [True, False], ids=["of today", "of before sweeps had a record"])
def test_a_copied_sweep_is_a_new_one_in_wandb_and_so_is_each_job_that_goes_on_in_it(tmp_path, lines, has_record):
    sweep = tmp_path / "first"
    a_run(sweep)
    a_run(sweep / "0a1b2c3d")
    (sweep / "0a1b2c3d" / "job.json").write_text("{}")
    if not has_record:
        (sweep / "run.json").unlink()
    shutil.copytree(sweep, tmp_path / "second")
    copied = tmp_path / "second"
    origin.settle(copied, place_of_jobs(copied))
    origin.settle(copied / "0a1b2c3d")
    about = describe_sweep(config().wandb, copied, "second", [{}])
    assert about["id"] != "good1234" and about["notes"] == f"copied from {sweep}"
    assert describe_run(config(), copied / "0a1b2c3d", resumed=True)["id"] != "good1234"
    origin.settle(sweep, place_of_jobs(sweep))
    original = describe_sweep(config().wandb, sweep, "first", [{}])
    assert original["id"] == "good1234" and "notes" not in original
    assert lines() == [f"copied from {sweep}{job}: this is a new one from here on" for job in ("", "/0a1b2c3d")]


@pytest.mark.parametrize("text", ["", "[]", '{"id": 5}', '{"id": "a", "directory": "\\u0000"}', '{"id": "a"}'])
def test_whatever_the_record_is_the_run_goes_on(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    origin.settle(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["directory"] == str(tmp_path)
