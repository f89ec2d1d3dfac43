"""Every command in the README, and in the guide to sweeps, is one that works, and so is what is shown of Python."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, adamw_config
from test_launch import composed

from gpt import optim
from gpt.config import arguments, launch, value_errors
from gpt.notebook import build_model
from gpt.progress import Progress
from gpt.runs import checkpoint
from gpt.runs.checkpoint import Identity

README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "experiments" / "README.md").read_text()
COMMAND = re.compile(r"(?:^ *(?:\$ )?|`)python ((?:train|generate|prepare_data|evaluate)\.py[^\n#`]*)", re.M)
COMMANDS = sorted(
    {command for command in COMMAND.findall(README + GUIDE) if "<" not in command and "--" not in command}
)
TUTORIAL = (ROOT / "experiments" / "tutorial" / "README.md").read_text()
PYTHON = sorted(set(re.findall(r"^```python\n(.*?)^```", README + TUTORIAL, re.M | re.S)))
# tests/sweeps/test_plugins.py composes these.
PLUGIN_KEYS = ("hydra/launcher=", "hydra.launcher.", "hydra/sweeper=", "hydra.sweeper.")


def first_of_each_axis(override):
    key, _, value = override.partition("=")
    if interval := re.search(r"interval\((.*?),", value):
        return f"{key}={interval[1]}"
    return override if value.startswith("[") else f"{key}={value.split(',')[0]}"


def test_there_are_commands_for_all_scripts():
    assert {command.split(".py")[0] for command in COMMANDS} >= {"train", "generate", "prepare_data"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_composes_to_a_valid_configuration(command):
    script, *typed = shlex.split(command)
    script = script.removesuffix(".py")
    is_sweep = "-m" in typed
    overrides = [argument for argument in typed if not argument.startswith("-")]
    if is_sweep:
        overrides = [first_of_each_axis(override) for override in overrides if not override.startswith(PLUGIN_KEYS)]
    overrides = [text for override in overrides for text in arguments.taken_as_typed(override, may_be_several=False)]
    assert value_errors.find_errors(composed(*overrides, script=script), launch.schema_of(script)) == []


@pytest.mark.parametrize("code", PYTHON)
def test_what_is_shown_of_python_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build_model("model.n_layer=1", "model.n_embd=16")
    run = Path("outputs", "runs", "mine")
    run.mkdir(parents=True)
    identity = Identity(model.config, model.vocab_size, "gpt2", "alpaca")
    optimizer = optim.build(model, adamw_config())
    checkpoint.publish(run, model, optimizer, Progress(step=1, best=9.0, best_step=1), identity, {})
    variables = {}
    exec(code, variables)
    assert capsys.readouterr().out.strip()


def test_the_test_command_is_the_one_that_continuous_integration_runs():
    assert re.search(r"^ *pip install -r requirements-dev.txt && pytest", README, re.M)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"`((?:conf|gpt|experiments|tests)/[\w/.-]+)`", README):
        assert (ROOT / name).exists(), name
