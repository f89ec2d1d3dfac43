"""One run, one directory."""

import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt import run_directory
from gpt.errors import UserError

HOLD = """
import sys, pathlib
from gpt import run_directory
with run_directory.owned(pathlib.Path(sys.argv[1])):
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
    with pytest.raises(UserError) as caught, run_directory.owned(tmp_path / "run"):
        pass
    assert caught.value.code == 6
    assert re.search(rf"run dir in use by pid {owner.pid} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", str(caught.value))


def test_a_killed_owner_leaves_the_directory_free(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with run_directory.owned(tmp_path / "run"):
        assert f"pid {os.getpid()} since" in (tmp_path / "run" / ".lock").read_text()


def test_a_run_that_has_ended_leaves_the_directory_free_for_the_same_process(tmp_path):
    for _ in range(2):
        with run_directory.owned(tmp_path / "run"):
            pass


def test_a_directory_that_cannot_be_made_or_written_to_is_an_error_of_the_environment(tmp_path):
    (tmp_path / "file").write_text("no directory")
    for path in (tmp_path / "file" / "run", tmp_path / "file", ROOT.__class__("/proc/run")):
        with pytest.raises(UserError, match="cannot write to the run directory") as caught, run_directory.owned(path):
            pass
        assert caught.value.code == 5


def test_a_hostile_lock_file_is_shown_escaped_and_short(tmp_path, owner):
    (tmp_path / "run" / ".lock").write_text("\x1b[31m" + "x" * 10_000)
    with pytest.raises(UserError) as caught, run_directory.owned(tmp_path / "run"):
        pass
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)
