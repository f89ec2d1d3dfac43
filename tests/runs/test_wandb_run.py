"""A run in W&B: where its credentials come from, and what an agent of a W&B sweep decides. What happens when W&B is
away is in test_wandb_outage.py."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from test_launch import composed
from test_run_log import root  # noqa: F401
from wandb_server import KEY, ROOT, Run, Server, children

from gpt.config import launch, schema, value_errors
from gpt.runs import wandb_run

SWEEP = ROOT / "experiments" / "wandb" / "lr_vs_context.yaml"


def test_credentials_are_found_in_the_environment_and_in_netrc(root, tmp_path, monkeypatch):  # noqa: F811
    import wandb

    def found() -> str:
        wandb.teardown()
        wandb.setup(wandb.Settings(silent=True))
        return wandb_run._online_or_offline("auto", "run")

    assert found() == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert found() == "online"
    monkeypatch.delenv("NETRC")
    assert found() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert found() == "online"
    wandb.teardown()


AGENT = """
import os, yaml
from pathlib import Path
from wandb.wandb_agent import Agent

sweep, script, lr, context_length = arguments
agent = Agent(None, None, sweep_id="sweep1")
agent._sweep_command = yaml.safe_load(Path(sweep).read_text())["command"]
values = {"optimizer.lr": {"value": float(lr)}, "model.context_length": {"value": int(context_length)}}
agent._command_run({"run_id": "agent123", "program": script, "args": values})
os._exit(agent._run_processes["agent123"].wait())
"""
STARTED = """
import json, os, sys
variables = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
print(json.dumps({"arguments": sys.argv[1:], "variables": variables}))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The arguments and variables with which W&B's agent, whose server has chosen these values, starts a program."""
    folder = tmp_path_factory.mktemp("agent")
    (folder / "program.py").write_text(STARTED)
    child = children().start(
        AGENT, str(SWEEP), str(folder / "program.py"), "1.2345e-05", "64",
        cwd=folder, WANDB_SWEEP_ID="sweep1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )  # fmt: skip
    assert child.wait() == 0, child.stderr
    return json.loads(child.stdout)


def test_what_an_agent_starts_is_a_valid_command_of_train_py(started):
    overrides = started["arguments"]
    assert overrides[-2:] == ["optimizer.lr=1.2345e-05", "model.context_length=64"]
    cfg = composed(*overrides)
    assert value_errors.find_errors(cfg, schema.TrainConfig) == []
    run = launch.to_dataclass(cfg, schema.TrainConfig)
    assert (run.optimizer.lr, run.model.context_length, run.model.name) == (1.2345e-05, 64, "mini")
    sweep = yaml.safe_load(SWEEP.read_text())
    lr, lengths = (sweep["parameters"][key] for key in ("optimizer.lr", "model.context_length"))
    assert (lr["min"], lr["max"], lengths["values"]) == (0.0003, 0.003, [64, 128, 256])  # numbers, as W&B reads YAML
    assert sweep["program"] == "train.py" and sweep["project"] == run.wandb.project
    choices = {
        key: range_.get("values") or [range_["min"], range_["max"]] for key, range_ in sweep["parameters"].items()
    }
    fixed = sweep["command"][3:-1]
    for number in (0, -1):
        ends = [f"{key}={values[number]}" for key, values in choices.items()]
        assert value_errors.find_errors(composed(*fixed, *ends), schema.TrainConfig) == []


RUN = """
from pathlib import Path
from test_run_log import config
from gpt.runs import run_log
from gpt.terminal import console

console.setup()
directory, *typed = arguments
with run_log.start(config("auto", overrides=typed), Path(directory), -1) as log:
    for step, loss in enumerate((2.0, 1.0, 1.5)):
        log.event({"step": step, "val/loss": loss}, [])
"""


def test_a_run_that_an_agent_starts_is_the_agents_and_a_job_of_our_own_sweep_is_not(tmp_path, started):
    for name in ("run", "job"):
        (tmp_path / name).mkdir()
    (tmp_path / "job" / "job.json").write_text('{"name": "optimizer.lr=0.1"}')  # "no -m" has been overlooked
    with Server() as server:
        server.runs["agent123"] = Run()  # the agent's server has made it
        folder = {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), "WANDB_PROJECT": "theirs"}
        environment = started["variables"] | folder | server.environment
        begun = [children().start(RUN, str(tmp_path / name), *started["arguments"], **environment)
                 for name in ("run", "job")]  # fmt: skip
        assert [(child.wait(), child.stderr) for child in begun] == [(0, "")] * 2
        about = [json.loads(body)["variables"] for _, _, body in server.received if b"UpsertBucket" in body]
    ids = {name: json.loads((tmp_path / name / "wandb.json").read_text())["id"] for name in ("run", "job")}
    assert ids["run"] == "agent123" and set(server.runs) == set(ids.values()) and len(set(ids.values())) == 2
    metric = yaml.safe_load(SWEEP.read_text())["metric"]
    for run in server.runs.values():
        assert [row[metric["name"]] for row in run.rows] == [2.0, 1.0, 1.5]
        assert json.loads(run.summary)[metric["name"]] == {"min": 1.0, "last": 1.5} and metric["goal"] == "minimize"
    by_id = {values["name"]: values for values in reversed(about) if values.get("displayName")}
    theirs, ours = (by_id[run_id] for run_id in ids.values())
    assert (theirs["project"], theirs["sweep"]) == ("theirs", "sweep1")
    assert theirs["displayName"] == "optimizer.lr=1.2345e-05 model.context_length=64"
    assert (ours["project"], ours["sweep"], ours["displayName"]) == ("test", None, "optimizer.lr=0.1")
    settings = {key: entry["value"] for key, entry in json.loads(theirs["config"]).items()}
    assert settings["optimizer.lr"] == 1.2345e-05 and settings["seed"] == 7
