"""Adding an optimizer as the README says: a dataclass with its name in the union, and a file of values."""

import os
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from conftest import ROOT

from gpt.config.optimizers import OPTIMIZERS

ADDED = """
@section
class AdafactorConfig:
    built_by: ClassVar[str] = "torch.optim:Adafactor"

    name: Literal["adafactor"]
    lr: Positive
    weight_decay: NonNegative
    d: Positive


# The only list"""
SMALL = "model.n_layer=1 model.n_embd=32 model.context_length=32 train.tokens_per_step=64 train.eval_tokens=256"


def test_the_names_are_those_of_the_files():
    names = {name for kind in get_args(OPTIMIZERS) for name in get_args(kind.__annotations__["name"])}
    assert names == {path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml")}


@pytest.mark.exhaustive
def test_one_file_of_code_and_one_of_values_add_an_optimizer_whose_run_resumes(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("gpt", "conf", "outputs", ".git"):
            (project / path.name).symlink_to(path)
    subprocess.run(["cp", "-r", str(ROOT / "gpt"), str(ROOT / "conf"), str(ROOT / "train.py"), "--remove-destination",
                    str(project)], check=True)  # fmt: skip
    file = project / "gpt" / "config" / "optimizers.py"
    text = (
        file.read_text()
        .replace("\n# The only list", ADDED, 1)
        .replace("| SGDConfig\n", "| SGDConfig | AdafactorConfig\n")
    )
    file.write_text(text)
    values = yaml.safe_dump({"name": "adafactor", "lr": 0.01, "weight_decay": 0.0, "d": 1.0})
    (project / "conf" / "optimizer" / "adafactor.yaml").write_text(values)

    def train(steps: int) -> str:
        arguments = [*SMALL.split(), "optimizer=adafactor", f"out_dir={tmp_path / 'run'}", f"train.max_steps={steps}"]
        result = subprocess.run(
            [sys.executable, str(project / "train.py"), *arguments, "wandb.mode=disabled", "train.compile=false"],
            env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    assert "resuming" not in train(2)
    assert "resuming from step_00000002" in train(4)
