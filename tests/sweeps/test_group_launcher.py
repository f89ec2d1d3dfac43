"""Jobs that run in groups of processes: so many at once, each with what it needs, and what is recorded of a group."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode

from gpt.sweeps import hydra_patches, jobs
from gpt.sweeps.group_launcher import GroupLauncher, report
from gpt.sweeps.job_process import Fault
from gpt.sweeps.jobs import Job
from gpt.sweeps.local_group import Outcome, Shape

SHAPES = [Shape(2, 0, {"PLACE": "a"}), Shape(2, 0, {"PLACE": "b"})]


class Scripted:
    """A group in this process; `work` is what it does."""

    def __init__(self, launcher):
        self._launcher, self._end = launcher, threading.Event()

    def run(self, job, shape, log):
        self._launcher.started.append((log.parent.name, shape.variables["PLACE"]))
        return self._launcher.work(log.parent, shape, self._end)

    def end(self):
        self._end.set()


class ScriptedLauncher(GroupLauncher):
    def __init__(self, work):
        self.work, self.started = work, []

    def shapes(self, n_jobs):
        return SHAPES

    def open(self, shape):
        return Scripted(self)


@pytest.fixture
def launched(tmp_path):
    """Hands jobs with these names to a launcher whose groups do `work`."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("device: cpu\n")
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
    hydra_patches.freeze(loader)
    config = loader.load_configuration("train", [f"hydra.sweep.dir={tmp_path}/sweep"], RunMode.MULTIRUN)

    def prepare(work):
        launcher = ScriptedLauncher(work)
        launcher.setup(hydra_context=HydraContext(loader, None), task_function=None, config=config)
        return launcher, lambda names: launcher.launch([[f"hydra.sweep.subdir={name}"] for name in names], 0)

    return prepare


def test_as_many_groups_run_at_once_as_there_are_places_and_no_place_is_taken_twice(launched):
    taken, meeting = [], threading.Barrier(2, timeout=20)

    def work(folder, shape, end):
        assert shape.variables["PLACE"] not in taken
        taken.append(shape.variables["PLACE"])
        meeting.wait()  # for one more, which must run at the same time
        taken.remove(shape.variables["PLACE"])
        return Outcome(0, None)

    launcher, launch = launched(work)
    returned = launch(["one", "two", "three", "four"])
    assert sorted(name for name, _ in launcher.started) == ["four", "one", "three", "two"]
    assert [job.overrides for job in returned] == [[f"hydra.sweep.subdir={n}"] for n in ("one", "two", "three", "four")]


def test_when_the_sweep_ends_all_groups_are_asked_to_end_and_no_other_starts(launched, capsys):
    both = threading.Barrier(3, timeout=20)

    def work(folder, shape, end):
        both.wait()
        assert end.wait(20)
        return Outcome(1, Fault("what comes of an end is no fault", 1))

    launcher, launch = launched(work)
    ending = threading.Thread(target=lambda: (both.wait(), launcher.end()))
    ending.start()
    launch(["one", "two", "three"])
    ending.join()
    assert sorted(name for name, _ in launcher.started) == ["one", "two"] and capsys.readouterr().err == ""


def test_a_group_that_fails_leaves_the_others_alone(launched, tmp_path, capsys):
    def work(folder, shape, end):
        return Outcome(1, Fault("no more memory", 5)) if folder.name == "one" else Outcome(0, None)

    for name in ("one", "two"):
        jobs.write(Job(tmp_path / "sweep" / name, 0, [], {}, name))
    launched(work)[1](["one", "two"])
    assert [jobs.load(tmp_path / "sweep" / name).status for name in ("one", "two")] == ["failed", "new"]
    assert capsys.readouterr().err == f"error: {jobs.failure(jobs.load(tmp_path / 'sweep' / 'one'))}\n"


NEW = Job(Path("x"), 0, [], {}, "seed=1")
RUNNING, FAILED = (
    replace(NEW, status="running"),
    replace(NEW, status="failed", error="lost one", code=1, log="train.log"),
)


@pytest.mark.parametrize(
    ("before", "now", "fault", "expected"),
    [
        (NEW, NEW, None, ("failed", "its processes ended before it began", 1, "torchrun.log")),
        (NEW, RUNNING, None, ("interrupted", None, None, "torchrun.log")),  # killed
        (FAILED, FAILED, None, ("failed", "its processes ended before it began", 1, "torchrun.log")),
        (NEW, FAILED, None, ("failed", "lost one", 1, "train.log")),
        (NEW, FAILED, Fault("no memory", 5), ("failed", "lost one", 1, "train.log")),
        (NEW, RUNNING, Fault("no memory", 5), ("failed", "no memory", 5, "torchrun.log")),
        (NEW, replace(RUNNING, status="interrupted"), Fault("x", 4), ("failed", "x", 4, "torchrun.log")),
    ],
)
def test_the_record_says_why_a_group_has_ended(before, now, fault, expected, tmp_path, capsys):
    jobs.write(replace(before, folder=tmp_path))
    recorded = jobs.load(tmp_path)
    jobs.write(replace(now, folder=tmp_path))
    report(recorded, tmp_path, Outcome(1, fault))
    job = jobs.load(tmp_path)
    assert (job.status, job.error, job.code, job.log and Path(job.log).name) == expected
    assert capsys.readouterr().err == f"error: {jobs.failure(job)}\n"


@pytest.mark.parametrize("status", ["completed", "stopped", "paused"])
def test_a_job_that_has_come_to_its_end_stays_so(status, tmp_path, capsys):
    jobs.write(replace(NEW, folder=tmp_path, status=status))
    done = jobs.load(tmp_path)
    report(replace(done, status="new"), tmp_path, Outcome(1, Fault("too late", 1)))
    assert jobs.load(tmp_path) == done and capsys.readouterr().err == ""
