"""One run, one directory."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from filelock import lock_descriptor, unlock_descriptor

from gpt.errors import UserError
from gpt.files import directory

HOLD = """
import sys, pathlib
from gpt.files import directory
with directory.owned(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that runs in tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_a_second_run_in_the_same_directory_is_refused_with_the_owner(tmp_path, owner):
    with pytest.raises(UserError) as caught, directory.owned(tmp_path / "run"):
        pass
    assert caught.value.code == 6
    assert re.search(rf"run dir in use by pid {owner.pid} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", str(caught.value))


def test_a_killed_owner_leaves_the_directory_free(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with directory.owned(tmp_path / "run"):
        assert f"pid {os.getpid()} since" in (tmp_path / "run" / ".lock").read_text()


def test_a_run_that_has_ended_leaves_the_directory_free_for_the_same_process(tmp_path):
    for _ in range(2):
        with directory.owned(tmp_path / "run"):
            pass


def test_a_directory_that_cannot_be_made_or_written_to_is_an_error_of_the_environment(tmp_path):
    (tmp_path / "file").write_text("no directory")
    for path in (tmp_path / "file" / "run", tmp_path / "file", ROOT.__class__("/proc/run")):
        with pytest.raises(UserError, match="cannot write to the run directory") as caught, directory.owned(path):
            pass
        assert caught.value.code == 5


def test_a_hostile_lock_file_is_shown_escaped_and_short(tmp_path, owner):
    (tmp_path / "run" / ".lock").write_text("\x1b[31m" + "x" * 10_000)
    with pytest.raises(UserError) as caught, directory.owned(tmp_path / "run"):
        pass
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)


def test_whether_somebody_runs_in_a_directory_can_be_asked(tmp_path, owner):
    run_dir = tmp_path / "run"
    written = (run_dir / ".lock").read_text()
    assert [directory.is_owned(run_dir) for _ in range(3)] == [True] * 3
    assert (run_dir / ".lock").read_text() == written
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert not directory.is_owned(run_dir)


def test_where_no_run_has_been_nobody_is(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / "odd"):
        assert not directory.is_owned(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "odd"]


def test_nobody_fails_to_start_because_others_look_at_that_instant(tmp_path, record_property):
    def look():
        while not done.is_set():
            answers.append(directory.is_owned(tmp_path))

    done, answers, starts = threading.Event(), [], 0
    with directory.owned(tmp_path):
        pass
    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        end = time.monotonic() + 0.5
        while time.monotonic() < end or not (True in answers and False in answers):
            with directory.owned(tmp_path):
                starts += 1
                time.sleep(0.001)
            time.sleep(0.001)
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()
    assert starts > 10 and answers.count(False) > 10  # and at least one True, or the loop would not have ended
    record_property("count", f"{starts} starts while others looked {len(answers)} times: none was refused")


def test_a_start_waits_for_a_look_but_not_for_long(tmp_path):
    """`is_owned` takes the lock, too: held for longer than its instant, it is somebody's."""
    with directory.owned(tmp_path):
        pass
    with open(tmp_path / ".lock") as file:
        lock_descriptor(file.fileno())
        started = time.monotonic()
        with pytest.raises(UserError) as caught, directory.owned(tmp_path):
            pass
        assert caught.value.code == 6 and time.monotonic() - started >= directory.PATIENCE
        threading.Timer(0.1, unlock_descriptor, (file.fileno(),)).start()
        with directory.owned(tmp_path):
            pass
        time.sleep(0.1)


def test_those_who_look_at_the_same_time_do_not_take_each_other_for_owners(tmp_path):
    with directory.owned(tmp_path):
        pass

    def is_seen():
        with open(tmp_path / ".lock") as file:
            lock_descriptor(file.fileno())
            threading.Timer(0.005, unlock_descriptor, (file.fileno(),)).start()
            seen = directory.is_owned(tmp_path)
            time.sleep(0.1)
        return seen

    assert not all(is_seen() for _ in range(5))  # on a busy machine, an instant may take long


def test_a_lock_file_of_an_older_version_marks_its_directory_and_names_its_owner(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / ".lock").write_text("pid 17 since 2026-01-31 12:00:00\n")
    with open(tmp_path / ".lock") as file:
        lock_descriptor(file.fileno())
        with pytest.raises(UserError, match="in use by pid 17 since 2026-01-31 12:00:00 "), directory.owned(tmp_path):
            pass


def test_the_byte_that_is_locked_tells_nothing_as_windows_lets_nobody_else_read_it(tmp_path):
    with directory.owned(tmp_path):
        written = (tmp_path / ".lock").read_bytes()
    assert written[:1] == b" " and directory.last_owner(tmp_path / ".lock") == written.decode().strip()


def test_in_a_sweep_another_name_of_the_sweep_is_the_remedy(tmp_path):
    assert directory.another(tmp_path / "run") == "another out_dir"
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text("{}")
    assert directory.another(tmp_path / "job") == "another sweep.name"


def test_only_folders_without_files_of_anybody_are_removed(tmp_path):
    made = directory.missing(tmp_path / "a" / "run")
    made[0].mkdir(parents=True)
    (made[0] / "train.log").write_text("x")
    (made[0] / "mine.txt").write_text("x")
    directory.remove_unused(made, ("train.log",))
    assert sorted(path.name for path in made[0].iterdir()) == ["mine.txt", "train.log"]
    (made[0] / "mine.txt").unlink()
    directory.remove_unused(made, ("train.log",))
    assert list(tmp_path.iterdir()) == []


SOMEBODYS = ["README.md", "config.yaml", "thesis/chapter.tex", "checkpoints/best.ckpt", ".env", "train.log"]


@pytest.mark.parametrize("name", SOMEBODYS)
def test_a_folder_with_somebodys_files_is_no_run_and_nothing_is_written_to_it(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    what = f"not empty, and no run dir: it has {name.partition('/')[0]}"
    with pytest.raises(UserError, match=what) as caught, directory.owned(tmp_path):
        pass
    assert caught.value.code == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", ".DS_Store", "checkpoints/step_00000001", "job.json"])
def test_a_run_that_was_killed_at_its_start_or_copied_without_hidden_files_is_known(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with directory.owned(tmp_path):
        (tmp_path / "README.md").write_text("a run's")
    with directory.owned(tmp_path):
        pass


def test_a_sweep_is_no_directory_for_a_run_unless_a_run_is_there_already(tmp_path):
    with directory.owned(tmp_path, marks=directory.SWEEP):
        (tmp_path / "1a2b3c4d").mkdir()
        (tmp_path / "1a2b3c4d" / "job.json").touch()
    with (
        pytest.raises(UserError, match=r"a sweep, and no run .*name one of its jobs") as caught,
        directory.owned(tmp_path),
    ):
        pass
    assert caught.value.code == 2
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    for marks in (directory.RUN, directory.SWEEP):
        with directory.owned(tmp_path, marks=marks):
            pass
