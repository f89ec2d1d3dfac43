"""From a command line to typed values: all that is wrong is said at once."""

import subprocess
import sys

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from gpt import config, schema


def composed(*overrides, script="train"):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(script, overrides=["overrides=[]", "out_dir=x", *overrides] if script == "train" else overrides)
    return cfg


def problems(*overrides):
    return config.find_problems(composed(*overrides), schema.TrainConfig)


def run_script(*arguments, script="train.py", cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def test_the_default_configuration_has_no_problem_and_becomes_a_dataclass():
    assert problems() == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.lr=0"], "optimizer.lr=0: input should be greater than 0"),
        (["optimizer.lr=-1e-3"], "optimizer.lr=-0.001: input should be greater than 0"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: input should be a finite number"),
        (["optimizer.lr=fast"], "optimizer.lr=fast: input should be a valid number"),
        (["model.dropout=1.5"], "model.dropout=1.5: input should be less than 1"),
        (["model.n_layer=2.5"], "model.n_layer=2.5: input should be a valid integer"),
        (["model.n_layer=true"], "model.n_layer=True: input should be a valid integer"),
        (["model.n_head=3"], "model.n_embd 128 is not divisible by model.n_head 3"),
        (["schedule.warmup=100", "train.max_steps=50"], "schedule.warmup 100 > train.max_steps 50"),
        (["train.tokens_per_step=64"], "train.tokens_per_step 64 is less than one row of model.context_length 128"),
        (["++optimizer.learning_rate=1"], "unknown key optimizer.learning_rate"),
        (["++optimzer.lr=1"], "unknown key optimzer, did you mean optimizer?"),
        (["++train.max_step=1"], "unknown key train.max_step, did you mean train.max_steps?"),
        (["~train.eval_every"], "missing key train.eval_every"),
        (["data.mask=prompt"], "data.mask=prompt: input should be 'response' or 'all'"),
        (["optimizer.name=adam"], "optimizer.name"),
        (["device=gpu"], "device=gpu"),
        (["data.val_fraction=0"], "data.val_fraction 0 and data.test_fraction"),
    ],
)
def test_a_bad_value_is_named_by_its_full_key(overrides, expected):
    found = problems(*overrides)
    assert len(found) == 1 and expected in found[0], found


def test_all_problems_are_reported_together():
    bad = ["optimizer.lr=-1", "model.dropout=1.5", "++train.max_step=1", "model.n_head=5", "seed=-1"]
    assert len(problems(*bad)) == 5


def test_a_million_tokens_may_be_written_as_1e6():
    assert problems("train.max_tokens=1e6") == []
    assert problems("train.max_tokens=1.5") != []


def test_relative_paths_are_relative_to_the_project():
    assert config.absolute("outputs/x") == ROOT / "outputs" / "x"
    assert config.absolute("/elsewhere/x").as_posix() == "/elsewhere/x"


def test_misspelt_keys_and_bad_values_end_with_one_line_and_code_2_before_torch_is_loaded(tmp_path):
    program = (
        "import sys, runpy; sys.argv[0] = 'train.py'\n"
        f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    arguments = ["optimzer.lr=1", "model.n_head=3", "train.max_step=5", f"out_dir={tmp_path / 'run'}"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.returncode == 2
    assert result.stdout == "False\n"
    assert len(result.stderr.splitlines()) == 1
    for part in ("did you mean optimizer?", "n_embd 128 is not divisible", "did you mean train.max_steps?"):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=huge"], "model/huge"),
        (["experiments=lr_vs_contxt"], "lr_vs_contxt"),
        (["optimizer.lr=["], "optimizer.lr"),
        (["+optimzer.lr=1"], "did you mean optimizer"),
        (["-m", "optimizer.lr=1e-3,1e-4", "modl.n_head=1,2"], "unknown key modl, did you mean model"),
        (["-m", "optimizer.lr=1e-3", "out_dir=here"], "each job of a sweep needs its own"),
    ],
)
def test_a_command_line_that_hydra_refuses_is_one_line_too(arguments, expected, tmp_path):
    result = run_script(*arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    if "out_dir=here" not in arguments:  # that one is seen by each job, and a sweep with a failed job ends with 1
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["train.py", "generate.py", "prepare_data.py"])
def test_help_has_purpose_examples_and_groups_and_prints_nothing_else(script):
    result = run_script("--help", script=script)
    assert result.returncode == 0 and result.stderr == ""
    assert "Examples" in result.stdout and f"python {script}" in result.stdout


def test_an_output_path_that_cannot_be_written_is_an_environment_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script(f"out_dir={tmp_path / 'file' / 'run'}")
    assert result.returncode == 5
    assert len(result.stderr.splitlines()) == 1 and str(tmp_path / "file") in result.stderr
