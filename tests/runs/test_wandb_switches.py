"""W&B's own switches: `wandb offline`, `wandb disabled`, WANDB_MODE with its old words, and WANDB_DISABLED."""

import logging

import pytest
from test_run_log import config, fresh_wandb, root  # noqa: F401
from wandb_server import KEY, Server, children

from gpt.files.jsonl import read_rows
from gpt.runs import run_log, wandb_switches


@pytest.fixture
def home(tmp_path, monkeypatch, root):  # noqa: F811
    """An empty home, and an empty folder as the project and as the one of the start."""
    for name in ("here", "project", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(wandb_switches, "PROJECT_ROOT", tmp_path / "project")
    return tmp_path


def write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "variables, mode",
    [
        ({}, "auto"),
        ({"WANDB_MODE": ""}, "auto"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": " Offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "nonsense"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "yes"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "auto"),
        ({"WANDB_DISABLED": "0", "WANDB_MODE": "dryrun"}, "offline"),
    ],
)
def test_each_variable_means_what_its_user_means(home, monkeypatch, variables, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wanted, remark = wandb_switches.resolve("auto")
    assert wanted == mode
    assert bool(remark) == (mode in ("offline", "disabled"))
    assert wandb_switches.resolve("online")[0] == "online"
    assert ("wandb.mode=online goes before" in wandb_switches.resolve("online")[1]) == bool(remark)
    assert wandb_switches.resolve("disabled") == ("disabled", "")


@pytest.mark.parametrize("place", ["here/wandb", "here/.wandb", "project/wandb", "home/.config/wandb", "other/wandb"])
@pytest.mark.parametrize(
    "text, mode",
    [
        ("[default]\nmode = offline\n", "offline"),
        ("[default]\nMODE: disabled\n", "disabled"),
        ("[default]\nmode = dryrun\n", "offline"),
        ("\ufeff[default]\r\nbase_url = http://x\r\nmode = disabled\r\n", "disabled"),
        ("[default]\ndisabled = true\n", "disabled"),
        ("[default]\nentity = 100%me\nmode = offline\n", "offline"),
        ("[default]\nentity = me\n", "auto"),
        ("[other]\nmode = offline\n", "auto"),
        ("", "auto"),
        ("mode = offline\n", "offline"),  # W&B itself ignores this file
        (b"\xff\xfe[\0", "offline"),
    ],
)
def test_settings_files_of_the_start_of_the_project_and_of_the_user_are_obeyed(home, monkeypatch, place, text, mode):
    monkeypatch.setenv("WANDB_DIR", str(home / "other"))
    write(home / place, text)
    assert wandb_switches.resolve("auto")[0] == mode


def test_the_environment_goes_before_the_files_and_a_folders_file_before_the_users(home, monkeypatch):
    write(home / "home" / ".config" / "wandb", "[default]\nmode = disabled\n")
    assert wandb_switches.resolve("auto")[0] == "disabled"
    write(home / "here" / "wandb", "[default]\nmode = online\n")
    assert wandb_switches.resolve("auto") == ("online", "")
    write(home / "project" / "wandb", "[default]\nmode = offline\n")
    assert wandb_switches.resolve("auto")[0] == "offline"  # the more private one
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_switches.resolve("auto") == ("online", "")
    write(home / "elsewhere", "[default]\nmode = disabled\n")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "elsewhere"))
    (home / "project" / "wandb" / "settings").unlink()
    (home / "here" / "wandb" / "settings").unlink()
    assert wandb_switches.resolve("auto")[0] == "disabled"


COMMAND = """
from wandb.cli import cli
cli.cli(arguments, standalone_mode=False)
"""
RUN = """
from pathlib import Path
from test_run_log import config
from gpt.runs import run_log
from gpt.terminal import console

console.setup()
directory, mode = arguments
with run_log.start(config(mode), Path(directory), -1) as log:
    log.event({"step": 0, "val/loss": 1.0}, [])
"""


@pytest.mark.parametrize("typed, variables", [("offline", ()), ("disabled", ()), ("offline", ("WANDB_DIR",))])
def test_what_wandbs_own_command_has_switched_off_sends_nothing_unless_online_is_typed(tmp_path, typed, variables):
    (tmp_path / "run").mkdir()
    (tmp_path / "runs").mkdir()
    with Server() as server:
        environment = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path / "runs"), "WANDB_API_KEY": KEY}
        environment["WANDB_BASE_URL"] = server.environment["WANDB_BASE_URL"]
        own = {name: value for name, value in environment.items() if name in ("HOME", *variables)}
        assert children().start(COMMAND, typed, cwd=tmp_path, **own).wait() == 0
        assert (tmp_path / ("runs" if variables else "") / "wandb" / "settings").is_file()
        child = children().start(RUN, str(tmp_path / "run"), "auto", cwd=tmp_path, **environment)
        assert child.wait() == 0 and f"W&B: {typed} by mode={typed} in " in child.stdout
        assert server.received == [] and "warning" not in child.stderr
        child = children().start(RUN, str(tmp_path / "run"), "online", cwd=tmp_path, **environment)
        assert child.wait() == 0 and "warning" not in child.stderr  # W&B itself says that it reads this file
        assert f"W&B: wandb.mode=online goes before mode={typed} in " in child.stdout
        assert [len(run.rows) for run in server.runs.values()] == [1]


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "dryrun"), ("WANDB_MODE", "x"), ("WANDB_DISABLED", "true")])
def test_a_variable_that_switches_wandb_off_is_obeyed_and_overruled_by_what_is_typed(tmp_path, name, value):
    (tmp_path / "run").mkdir()
    with Server() as server:
        environment = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
        environment |= {**server.environment, "WANDB_MODE": "", name: value}
        child = children().start(RUN, str(tmp_path / "run"), "auto", cwd=tmp_path, **environment)
        assert child.wait() == 0 and server.received == [], child.stderr
        assert f" by {name}={value}\n" in child.stdout and child.stderr == ""
        child = children().start(RUN, str(tmp_path / "run"), "online", cwd=tmp_path, **environment)
        assert child.wait() == 0, child.stderr
        assert f"W&B: wandb.mode=online goes before {name}={value}\n" in child.stdout
        assert [len(run.rows) for run in server.runs.values()] == [1] and child.stderr == ""


@pytest.mark.usefixtures("fresh_wandb")
def test_a_mode_in_the_environment_that_wandb_does_not_know_loses_no_record(home, monkeypatch, caplog):
    run_dir = home / "here"
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with caplog.at_level(logging.INFO), run_log.start(config("auto"), run_dir, reported=-1) as log:
        log.event({"step": 1}, [])
    assert caplog.messages == ["W&B: disabled by WANDB_MODE=nonsense"]
    assert len(read_rows(run_dir / "metrics.jsonl")) == 1 and not (home / "wandb-root").exists()
