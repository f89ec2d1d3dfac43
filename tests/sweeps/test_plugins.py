"""hydra/launcher and hydra/sweeper: what conf/ has for them, and what is said where a plugin is missing or goes wrong.

The tests marked exhaustive start train.py with the real plugins, if requirements-sweeps.txt is installed.
"""

import inspect
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from launcher import launcher
from omegaconf import OmegaConf

import gpt.config.launch  # noqa: F401 - the resolvers that conf/train.yaml uses
from gpt.config import arguments, launch
from gpt.sweeps import hydra_patches, jobs

HYDRA = ROOT / "conf" / "hydra"
CHOICES = [
    f"hydra/{path.parent.relative_to(HYDRA)}={path.stem}"
    for slot in ("launcher", "sweeper")
    for path in sorted((HYDRA / slot).rglob("*.yaml"))
]
PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}
INSTALL = "not installed: pip install -r requirements-sweeps.txt"


def composed(*overrides):
    with initialize_config_dir(str(HYDRA.parent), version_base="1.3"):
        return compose("train", overrides=["sweep.name=x", *overrides], return_hydra_config=True)


def test_there_are_the_choices_that_the_readme_promises():
    assert {f"hydra/launcher={name}" for name in ("joblib", "submitit_local", "submitit_slurm", "torchrun", "ray")} <= {
        *CHOICES
    }
    assert "hydra/sweeper=optuna" in CHOICES


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_composes_without_its_plugin(choice):
    sampler = ["hydra/sweeper=optuna"] if "sampler" in choice else []
    cfg = composed(*sampler, choice)
    slot = choice.split("=")[0].split("/")[1]
    values = OmegaConf.to_container(cfg.hydra[slot], resolve=True)
    assert values["_target_"].startswith(("hydra_plugins.", "gpt.sweeps.")) and "???" not in values.values()
    folder = values.get("submitit_folder")
    assert folder in (None, str(ROOT / "outputs" / "sweeps" / "x" / ".submitit" / "%j"))


def test_resources_are_plain_keys():
    cfg = composed("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=64")
    assert (cfg.hydra.launcher.partition, cfg.hydra.launcher.mem_gb) == ("gpu", 64)
    storage = composed("hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///${hydra.sweep.dir}/optuna.db")
    assert storage.hydra.sweeper.storage == f"sqlite:///{ROOT}/outputs/sweeps/x/optuna.db"
    assert composed("hydra/sweeper=optuna", "hydra/sweeper/sampler=random").hydra.sweeper.sampler.keys() == {
        "_target_", "seed"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["torchrun", "ray"])
def test_each_launcher_of_this_project_takes_what_its_file_says(name):
    values = dict(composed(f"hydra/launcher={name}").hydra.launcher)
    launcher = hydra_patches.LAUNCHERS[values.pop("_target_")]
    assert list(inspect.signature(launcher).parameters) == list(values)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if PLUGINS.keys() & {*re.split("[=_]", choice)}])
def test_each_plugin_takes_what_its_file_says(choice):
    slot, name = choice.split("=")
    plugin = pytest.importorskip(PLUGINS[name.partition("_")[0]] + ".config", reason="requirements-sweeps.txt")
    names = {
        "joblib": "JobLibLauncherConf", "submitit_local": "LocalQueueConf", "submitit_slurm": "SlurmQueueConf",
        "optuna": "OptunaSweeperConf",
    }  # fmt: skip
    values = composed(choice).hydra[slot.partition("/")[2]]
    known = getattr(plugin, names[name])()
    assert known._target_ == values._target_ and set(values) <= set(vars(known))


@pytest.fixture(scope="module")
def starts():
    with launcher() as process:
        yield process


@pytest.mark.parametrize("slot", ["launcher", "sweeper"])
def test_a_plugin_that_is_not_installed_is_one_line_that_says_what_to_install(slot, tmp_path, starts):
    (tmp_path / "hydra" / slot).mkdir(parents=True)
    (tmp_path / "hydra" / slot / "theirs.yaml").write_text("_target_: hydra_plugins.hydra_of_theirs.Theirs\n")
    arguments = ["-m", f"--config-dir={tmp_path}", f"hydra/{slot}=theirs", f"hydra.sweep.dir={tmp_path}/sweep"]
    start = starts.start(*arguments)
    assert (start.code, start.stdout) == (2, "") and start.stderr.count("\n") == 1, start
    assert f"hydra/{slot}=theirs: {INSTALL}" in start.stderr and not start.imports
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "axis",
    [
        "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.dropout=interval(0,0.5)", "seed=range(1,9,2)",
        "optimizer.lr=choice(1e-4,1e-3)", "model=tiny,mini", "model=choice(tiny,mini)", "seed=int(interval(1,9))",
        "data.prompts=[a],[b]", "train.max_epochs=shuffle(range(1,4))",
    ],
)  # fmt: skip
def test_an_axis_of_a_search_is_left_to_hydra(axis):
    command = ["-m", "hydra/sweeper=optuna"]
    assert arguments.prepare([*command, axis], "train", launch.architecture) == [*command, axis]


BROKEN = """
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

class BrokenSweeper(Sweeper):
    def __init__(self, n_trials, params=None):
        pass
    def setup(self, **kwargs):
        pass
    def sweep(self, arguments):
        raise {error}
"""


@pytest.mark.parametrize(
    ("error", "n_trials", "code", "line"),
    [
        ("ValueError('low is\\nabove high')", 1, 2, "error: hydra/sweeper=broken: ValueError: low is above high\n"),
        ("RuntimeError('no srun')", 1, 5, "error: hydra/sweeper=broken: RuntimeError: no srun\n"),
        ("ValueError('No trials are completed yet.')", 1, 0, ""),
        ("ValueError('never')", 0, 2, "error: hydra.sweeper.n_trials=0: a whole number from 1 on\n"),
    ],
)
def test_what_goes_wrong_in_a_plugin_is_one_line_and_no_bug_of_ours(error, n_trials, code, line, tmp_path):
    package = tmp_path / "hydra_plugins" / "hydra_broken"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN.replace("{error}", error))
    (tmp_path / "hydra" / "sweeper").mkdir(parents=True)
    (tmp_path / "hydra" / "sweeper" / "broken.yaml").write_text(
        "_target_: hydra_plugins.hydra_broken.BrokenSweeper\nn_trials: 1\n"
    )
    arguments = [f"--config-dir={tmp_path}", "hydra/sweeper=broken", f"hydra.sweeper.n_trials={n_trials}"]
    result = train(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (code, line)


SMALL = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "data.tokenizer=bytes",
    "train.tokens_per_step=128", "train.max_steps=4", "train.eval_every=2", "train.eval_tokens=256",
    "train.sample_every=null", "device=cpu", "wandb.mode=disabled",
]  # fmt: skip


def train(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *arguments, f"hydra.sweep.dir={cwd}/sweep"],
        capture_output=True, text=True, cwd=cwd, timeout=300, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def sweep(data, tmp_path):
    """Runs small jobs with the plugin that a choice needs, from another directory."""

    def run(choice, *arguments):
        plugin = re.split("[=_]", choice)[1]
        pytest.importorskip(PLUGINS.get(plugin, "torch"), reason="requirements-sweeps.txt is not installed")
        result = train(choice, *SMALL, f"data.prepared_dir={data}", *arguments, cwd=tmp_path, OMP_NUM_THREADS="1")
        return result, jobs.read(tmp_path / "sweep")

    return run


AT_ONCE = [
    ["hydra/launcher=joblib"], ["hydra/launcher=submitit_local"],
    ["hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=1", "hydra.launcher.n_jobs=2"],
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("choice", AT_ONCE)
def test_jobs_at_once_are_the_jobs_one_after_the_other(choice, sweep, data, tmp_path):
    result, found = sweep(*choice, "seed=1,2")
    assert result.returncode == 0, result
    assert [job.status for job in found] == ["completed"] * 2 and found[0].val_loss != found[1].val_loss
    (tmp_path / "one").mkdir()
    one = train(*SMALL, f"data.prepared_dir={data}", "seed=1,2", cwd=tmp_path / "one", OMP_NUM_THREADS="1")
    assert one.returncode == 0, one
    alone = jobs.read(tmp_path / "one" / "sweep")
    assert [(job.id, job.val_loss) for job in alone] == [(job.id, job.val_loss) for job in found]
    assert str(tmp_path / "sweep") == result.stdout.splitlines()[-1]


@pytest.mark.exhaustive
def test_a_job_of_two_ranks_is_the_same_job_with_the_same_loss_but_for_rounding(sweep, data, tmp_path):
    group = ["hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2"]
    result, found = sweep(*group, "seed=1", "train.dtype=float32")
    assert result.returncode == 0 and result.stderr == "", result
    (tmp_path / "one").mkdir()
    one = train(
        *SMALL, f"data.prepared_dir={data}", "seed=1", "train.dtype=float32", cwd=tmp_path / "one", OMP_NUM_THREADS="1"
    )
    assert one.returncode == 0, one
    alone = jobs.read(tmp_path / "one" / "sweep")
    assert [job.id for job in alone] == [job.id for job in found]
    assert found[0].val_loss == pytest.approx(alone[0].val_loss, rel=1e-5)
    again, _ = sweep(*group, "seed=1", "train.dtype=float32")
    assert again.returncode == 0 and "1 job: 1 done" in again.stdout, again


@pytest.mark.exhaustive
@pytest.mark.parametrize("choice", AT_ONCE)
def test_a_job_that_fails_leaves_the_others_at_once_alone(choice, sweep):
    result, found = sweep(*choice, "optimizer.lr=1e-3,1e9", "train.max_skipped=0")
    assert result.returncode == 1 and [job.status for job in found] == ["completed", "failed"], result
    assert found[1].code == 4 and found[1].error in result.stdout + result.stderr


AXIS = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


def settings(found):
    return [job.config["optimizer.lr"] for job in found]


@pytest.mark.exhaustive
def test_a_search_in_memory_goes_on_where_it_was_because_it_suggests_the_same_again(sweep, tmp_path):
    arguments = ["hydra/sweeper=optuna", AXIS, "hydra.sweeper.sampler.n_startup_trials=2"]
    result, first = sweep(*arguments, "hydra.sweeper.n_trials=3")
    assert result.returncode == 0 and result.stderr == "", result
    assert len({*settings(first)}) == 3 and all(1e-4 <= lr <= 1e-2 for lr in settings(first))
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_value == pytest.approx(min(job.val_loss for job in first))
    written = [(job.folder / "metrics.jsonl").stat().st_mtime_ns for job in first]
    result, again = sweep(*arguments, "hydra.sweeper.n_trials=4")
    assert result.returncode == 0 and settings(again)[:3] == settings(first) and len(again) == 4, result
    assert written == [(job.folder / "metrics.jsonl").stat().st_mtime_ns for job in first]


@pytest.mark.exhaustive
def test_a_search_with_a_storage_goes_on_with_the_same_study(sweep, tmp_path):
    optuna = pytest.importorskip("optuna", reason="requirements-sweeps.txt is not installed")
    storage = "hydra.sweeper.storage=sqlite:///${hydra.sweep.dir}/optuna.db"
    arguments = ["hydra/sweeper=optuna", AXIS, storage, "hydra.sweeper.sampler.n_startup_trials=2"]
    for count in (2, 4):
        result, found = sweep(*arguments, "hydra.sweeper.n_trials=2")
        assert result.returncode == 0, result
        study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/optuna.db")
        assert len(study.trials) == count and study.best_value == min(job.val_loss for job in found)
    assert {trial.params["optimizer.lr"] for trial in study.trials} == {*settings(found)}


@pytest.mark.exhaustive
def test_failed_jobs_do_not_end_a_search(sweep, tmp_path):
    result, found = sweep("hydra/sweeper=optuna", "optimizer.lr=choice(1e9,1e-3)", "hydra.sweeper.n_trials=4")
    assert result.returncode == 1 and {job.status for job in found} == {"completed", "failed"}, result
    assert "this is a bug" not in result.stderr
    result, found = sweep("hydra/sweeper=optuna", "optimizer.lr=choice(1e9,2e9)", "hydra.sweeper.n_trials=2")
    assert result.returncode == 1 and "this is a bug" not in result.stderr, result


@pytest.mark.exhaustive
def test_several_suggestions_at_once_run_at_once(sweep):
    arguments = ["hydra/launcher=joblib", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=4"]
    result, found = sweep("hydra/sweeper=optuna", AXIS, *arguments)
    assert result.returncode == 0 and [job.status for job in found] == ["completed"] * 4, result
