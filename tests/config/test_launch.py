"""Scripts as commands: all faults are reported together, in one line, with the right exit code."""

import resource
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from gpt.config import launch
from gpt.files import paths
from gpt.sweeps import composition


def composed(*overrides, script="train"):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        typed = ["overrides=[]", "out_dir=x", *overrides] if script == "train" else list(overrides)
        cfg = compose(script, overrides=typed, return_hydra_config=True)
    return composition.without_hydra(cfg)


def run_script(*arguments, script="train.py", cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def test_relative_paths_in_a_configuration_are_relative_to_the_project():
    assert paths.absolute("outputs/x") == ROOT / "outputs" / "x"
    assert paths.absolute("/elsewhere/x").as_posix() == "/elsewhere/x"


def test_all_faults_are_one_line_and_code_2_within_two_seconds_and_before_torch_is_loaded(tmp_path):
    program = (
        "import sys, runpy; sys.argv[0] = 'train.py'\n"
        f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    arguments = ["optimzer.lr=1", "model.n_head=5", "train.max_step=5", "model=small", f"out_dir={tmp_path / 'run'}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor, which others may have at the same time
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert len(result.stderr.splitlines()) == 1
    for part in (
        "did you mean optimizer.lr?", "n_embd 768 is not divisible", "did you mean train.max_steps?",
    ):  # fmt: skip
        assert part in result.stderr
    assert seconds < 2


def test_each_job_of_a_sweep_needs_a_directory_of_its_own(tmp_path):
    result = run_script("-m", "optimizer.lr=1e-3", "out_dir=here", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert "each job of a sweep needs its own" in result.stderr and result.returncode == 2
    assert "Traceback" not in result.stderr + result.stdout


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


@pytest.mark.exhaustive
def test_the_pickle_of_a_job_is_run_again_as_anywhere_in_hydra(tmp_path):
    small = ["device=cpu", "debug=fast", "data.tokenizer=bytes", f"data.prepared_dir={tmp_path}/data"]
    small += ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "train.max_steps=1"]
    pickle = "+hydra.callbacks.pickle._target_=hydra.experimental.callbacks.PickleJobInfoCallback"
    first = run_script(*small, pickle, "hydra.output_subdir=.hydra", f"out_dir={tmp_path}/run")
    assert first.returncode == 0, first.stderr
    again = run_script("--experimental-rerun", str(tmp_path / "run" / ".hydra" / "config.pickle"))
    assert again.returncode == 0 and "already at step 1 of 1" in again.stdout, again


@pytest.mark.parametrize(
    "name", ["../../x", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("a/b", "-m"))]
)
def test_the_name_of_a_sweep_is_checked_before_it_names_a_folder(name, tmp_path):
    directory = f"hydra.sweep.dir={tmp_path}/far/${{sweep.name}}/below"
    for mode in (["-m", "seed=1,2"], []):
        where = directory if mode else f"out_dir={tmp_path}/run"
        result = run_script(*mode, f"sweep.name={name}", "optimizer.lr=-1", where)
        assert result.returncode == 2 and f"sweep.name={name}" in result.stderr and "optimizer.lr=-1" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_what_is_refused_leaves_no_folder(tmp_path):
    missing = ["data=alpaca", f"data.path={tmp_path}/no.json", f"data.prepared_dir={tmp_path}/run/data"]
    for fault in (["optimizer.lr=-1"], missing):
        assert run_script(*fault, f"out_dir={tmp_path}/a/run").returncode == 2
        assert run_script("-m", "seed=1,2", *fault, f"hydra.sweep.dir={tmp_path}/a/sweep").returncode == 2
        assert not (tmp_path / "a").exists()


def test_an_error_of_the_file_system_is_not_blamed_on_out_dir():
    assert launch.explain(PermissionError(13, "Permission denied", "/a/b.txt")) == (
        5, "Permission denied (/a/b.txt); check that it can be read and written",
    )  # fmt: skip
