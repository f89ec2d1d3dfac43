"""What is found out about a sweep before its first job: which jobs there are, what is wrong, what is said."""

import json
from types import SimpleNamespace

import pytest

from gpt.errors import ENVIRONMENT, UserError
from gpt.sweeps import selection
from gpt.sweeps.jobs import Job
from gpt.sweeps.selection import Planned


def planned(*jobs, axes=("lr",)):
    """Jobs, as (id, value, ...), by their overrides."""
    return {
        tuple(f"{axis}={value}" for axis, value in zip(axes, values, strict=True)): Planned([], None, job)
        for job, *values in jobs
    }


def job(tmp_path, name="a", steps=(), **changes):
    for step in steps:
        (tmp_path / name / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()
    values = {"number": 0, "overrides": [], "config": {"data.path": "x"}, "name": f"name={name}"}
    return Job(tmp_path / name, **{**values, **changes})


def test_the_first_line_of_a_sweep_counts_what_is_done_what_goes_on_and_what_is_new(tmp_path):
    mine = [
        *(job(tmp_path, f"done{i}", status="completed") for i in range(7)),
        job(tmp_path, "goes on", steps=(100, 120), status="interrupted"),
        job(tmp_path, "failed", steps=(100,), status="failed"),
        job(tmp_path, "killed before its first checkpoint", status="interrupted"),
        *(job(tmp_path, f"new{i}") for i in range(2)),
    ]
    assert selection.describe(mine, 0) == "12 jobs: 7 done, 1 resumes at step 120, 1 failed (again), 3 new"


def test_the_first_line_names_the_steps_of_several_and_the_jobs_that_it_leaves_alone(tmp_path):
    mine = [job(tmp_path, f"{i}", steps=(i,), status="paused") for i in range(1, 11)]
    mine += [job(tmp_path, "s", status="stopped"), job(tmp_path, "h", steps=(5,), status="halved")]
    assert selection.describe(mine, 4) == (
        "12 jobs: 1 stopped from W&B, 1 halved, 10 resume at steps 1, 2, 3, 4, 5, 6, 7, 8, ...; "
        "4 more of this sweep are as they were"
    )
    assert selection.describe(mine[-2:-1], 0) == "1 job: 1 stopped from W&B"


def test_an_axis_changes_nothing_when_no_job_differs_by_it_whatever_the_other_axes_are(tmp_path):
    a, b, c = (job(tmp_path, name) for name in "abc")
    selection.check_axes(planned((a, 1), (b, 2)))
    selection.check_axes(planned((a, 1, 1), (a, 1, 2), (b, 2, 1), (c, 2, 2), axes=("lr", "decay")))  # sometimes it does
    selection.check_axes(planned((a, 1)))  # one value is no axis
    with pytest.raises(UserError, match="the axis decay=1, decay=2 changes nothing; leave it out"):
        selection.check_axes(planned((a, 1, 1), (a, 1, 2), (b, 2, 1), (b, 2, 2), axes=("lr", "decay")))


def ask(faults, are_elsewhere=False, **jobs):
    """check_jobs over jobs of which some have faults, and the data of the others has the fingerprint "now"."""

    def fingerprint_of(one):
        if one.job.id in faults:
            raise faults[one.job.id]
        return "now"

    selection.check_jobs({(name,): Planned([], None, one) for name, one in jobs.items()}, fingerprint_of, are_elsewhere)


def test_all_jobs_that_cannot_run_are_listed_each_fault_and_each_remedy_once(tmp_path):
    jobs = {name: job(tmp_path, name, config={"data.path": name}) for name in "abcd"}
    faults = {
        "a": UserError("too long", "512 > 256", "shorten it"),
        "b": UserError("too long", "512 > 256", "shorten it"),
        "d": UserError("no such device", "", "use device=auto", ENVIRONMENT),
    }
    with pytest.raises(UserError) as caught:
        ask(faults, **jobs)
    assert str(caught.value) == (
        "3 of 4 jobs cannot run, so none was started: name=a, name=b: too long (512 > 256); name=d: no such device; "
        "shorten it; use device=auto"
    )
    assert caught.value.code == ENVIRONMENT


def test_a_job_that_is_called_by_the_key_that_is_wrong_is_named_once(tmp_path):
    with pytest.raises(UserError, match=r"none was started: name=a: too small$"):
        ask({"a": UserError("name=a: too small")}, **{name: job(tmp_path, name) for name in "ab"})


def test_what_this_machine_lacks_is_no_fault_of_jobs_that_run_on_others(tmp_path):
    jobs = {name: job(tmp_path, name) for name in "ab"}
    ask({"a": UserError("no CUDA", code=ENVIRONMENT)}, are_elsewhere=True, **jobs)
    with pytest.raises(UserError, match="1 of 2 jobs"):
        ask({"a": UserError("bad data")}, are_elsewhere=True, **jobs)


def test_a_job_that_was_done_with_other_data_is_a_fault_and_one_that_has_not_begun_is_none(tmp_path):
    done = job(tmp_path, "a", status="completed", fingerprint="before")
    with pytest.raises(UserError) as caught:
        ask({}, a=done, b=job(tmp_path, "b"))
    assert "name=a: begun on data of fingerprint before, which is now now" in str(caught.value)
    assert "choose another sweep.name" in str(caught.value)
    ask({}, a=job(tmp_path, "a", status="completed", fingerprint="now"), b=job(tmp_path, "b"))


@pytest.mark.parametrize(
    ("name", "content", "is_other"),
    [
        ("sweep.json", json.dumps({"format": 3}), True),
        ("0/job.json", json.dumps({"num": 0}), True),
        ("a/job.json", '{"format": 2, "torn', False),  # damaged, and reported as that
        ("a/job.json", "[]", False),
        ("sweep.json", json.dumps({"format": 2}), False),
    ],
)
def test_a_sweep_of_another_version_is_told_from_a_damaged_one(tmp_path, name, content, is_other):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    if is_other:
        with pytest.raises(UserError, match=r"another version.*untouched"):
            selection.check_format(tmp_path)
    else:
        selection.check_format(tmp_path)
    assert (tmp_path / name).read_text() == content


def test_the_processes_of_jobs_are_told_the_name_of_the_sweep_and_the_folder_of_the_job(tmp_path):
    config = SimpleNamespace(sweep=SimpleNamespace(name=None), hydra=SimpleNamespace(sweep=SimpleNamespace(dir="/x/y")))
    known = job(tmp_path, "a")
    folder = f"hydra.sweep.subdir='{known.id}'"
    assert selection._named(config, ["seed=1"], known) == ["seed=1", "sweep.name=y", folder]
    config.sweep.name = "y"
    assert selection._named(config, ["seed=1"], known) == ["seed=1", folder]


def test_jobs_that_come_twice_are_one_warning(tmp_path, caplog):
    a, b, c = (job(tmp_path, name) for name in "abc")
    selection.warn_of_doubles([a, b, a, c, c, c])
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 6 jobs are doubles, and run once: name=a, name=c"
    ]
    selection.warn_of_doubles([a, b, c])
    assert len(caplog.records) == 1
