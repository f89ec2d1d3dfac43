"""What is changed in Hydra, and that a sweep keeps the YAML files as they were when it began."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from hydra import initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

import gpt.config.launch  # noqa: F401 - the resolvers that conf/train.yaml uses
from gpt.sweeps import hydra_patches

FILES = {
    "train.yaml": "defaults: [_self_, model: a]\nseed: 1\nlr: 0.1\nhydra: {searchpath: [file://SEARCH]}\n",
    "model/a.yaml": "name: a\nwidth: 80\n",
    "model/b.yaml": "defaults: [a, _self_]\nname: b\n",
    "study/x.yaml": "# @package _global_\ndefaults:\n  - override /model: b\nseed: 70\n",
    "elsewhere/extra/e.yaml": "depth: 30\n",
}
JOBS = [["seed=1"], ["model=b", "seed=2"], ["+study=x"], ["+extra=e", "lr=5"]]


@pytest.fixture
def conf(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("SEARCH", str(tmp_path / "conf" / "elsewhere")))
    return tmp_path / "conf"


def opened(conf, frozen=True, jobs=JOBS):
    """(loader, configuration of the sweep), after the jobs have been composed once."""
    with initialize_config_dir(str(conf), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
    if frozen:
        hydra_patches.freeze(loader)
    config = loader.load_configuration("train", ["seed=1,2"], RunMode.MULTIRUN)
    compositions(loader, config, jobs)
    return loader, config


EXPECTED = [
    {"seed": 1, "lr": 0.1, "model": {"name": "a", "width": 80}},
    {"seed": 2, "lr": 0.1, "model": {"name": "b", "width": 80}},
    {"seed": 70, "lr": 0.1, "model": {"name": "b", "width": 80}},
    {"seed": 1, "lr": 5, "model": {"name": "a", "width": 80}, "extra": {"depth": 30}},
]


def compositions(loader, config, jobs=JOBS):
    found = [OmegaConf.to_container(loader.load_sweep_config(config, job)) for job in jobs]
    return [{key: value for key, value in one.items() if key != "hydra"} for one in found]


def edit(conf):
    for path in conf.rglob("*.yaml"):
        text = path.read_text()
        for old, new in ((" 80", " 160"), (" 0.1", " 0.9"), (" 70", " 90"), (" 30", " 40")):
            text = text.replace(old, new)
        path.write_text(text)


EDITED = [
    {"seed": 1, "lr": 0.9, "model": {"name": "a", "width": 160}},
    {"seed": 2, "lr": 0.9, "model": {"name": "b", "width": 160}},
    {"seed": 90, "lr": 0.9, "model": {"name": "b", "width": 160}},
    {"seed": 1, "lr": 5, "model": {"name": "a", "width": 160}, "extra": {"depth": 40}},
]


def break_all(conf):
    for path in conf.rglob("*.yaml"):
        path.write_text("{[")


def remove(conf):
    for path in conf.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.filterwarnings("ignore:provider=hydra.searchpath")  # which is not there any more
@pytest.mark.parametrize("change", [break_all, remove])
def test_files_that_change_or_vanish_after_the_start_change_no_job(conf, change):
    loader, config = opened(conf)
    change(conf)
    assert compositions(loader, config) == EXPECTED


def test_without_a_snapshot_they_would_also_in_a_process_that_has_one(conf):
    frozen, config = opened(conf)
    with pytest.raises(HydraException):
        frozen.load_sweep_config(config, ["model=nope"])
    other, _ = opened(conf, frozen=False)
    assert compositions(other, config) == EXPECTED
    edit(conf)
    assert compositions(frozen, config) == EXPECTED
    assert compositions(other, config) == EDITED
    break_all(conf)
    with pytest.raises((yaml.YAMLError, HydraException)):
        compositions(other, config)
    assert compositions(frozen, config) == EXPECTED


def test_a_composition_that_is_changed_changes_no_later_one(conf):
    loader, config = opened(conf)
    cfg = loader.load_sweep_config(config, ["model=b"])
    OmegaConf.set_struct(cfg, False)
    cfg.model.width, cfg.seed, cfg.hydra.job.name = 99, 99, "changed"
    assert compositions(loader, config) == EXPECTED


def test_a_choice_that_appears_after_the_start_can_still_be_made(conf):
    """A sweeper that chooses as it goes may be the first to need a file."""
    loader, config = opened(conf)
    (conf / "model" / "late.yaml").write_text("name: late\n")
    assert loader.load_sweep_config(config, ["model=late"]).model.name == "late"
    (conf / "model" / "late.yaml").write_text("name: later\n")
    assert loader.load_sweep_config(config, ["model=late"]).model.name == "late"


def test_files_of_conf_count_alone_in_a_process_in_which_plugins_register_anew():
    """As in those of joblib: Hydra would refuse conf/hydra/sweeper/optuna.yaml beside what the plugin registers."""
    loader, _ = opened(ROOT / "conf", jobs=[])
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node={"defaults": [], "n_trials": 1})
    composed = loader.load_configuration("train", ["hydra/sweeper=optuna"], RunMode.MULTIRUN)
    assert composed.hydra.sweeper.n_trials == 20


def test_installing_twice_is_installing_once():
    hydra_patches.install()
    before = vars(Plugins)["instantiate_launcher"], vars(JobReturn)["return_value"].fset
    hydra_patches.install()
    assert (vars(Plugins)["instantiate_launcher"], vars(JobReturn)["return_value"].fset) == before


REPLACED = {  # what gpt/sweeps/hydra_patches.py replaces or builds on, and its parameters in Hydra 1.3.8
    "Plugins.instantiate_launcher": (
        hydra_patches.HYDRAS_INSTANTIATE_LAUNCHER, ["self", "hydra_context", "task_function", "config"],
    ),
    "Plugins.is_in_toplevel_plugins_module": (hydra_patches.HYDRAS_IS_PLUGIN, ["clazz"]),
    "ConfigLoaderImpl._apply_overrides_to_config": (hydra_patches.HYDRAS_APPLY_OVERRIDES, ["overrides", "cfg"]),
    "JobReturn.return_value": (JobReturn.return_value.fset, ["self", "value"]),
    "ConfigRepository": (ConfigRepository, ["config_search_path"]),
    "ConfigRepository.load_config": (ConfigRepository.load_config, ["self", "config_path"]),
    "ConfigRepository.config_exists": (ConfigRepository.config_exists, ["self", "config_path"]),
    "ConfigRepository.group_exists": (ConfigRepository.group_exists, ["self", "config_path"]),
    "ConfigRepository.get_schema_source": (ConfigRepository.get_schema_source, ["self"]),
    "CachingConfigRepository": (CachingConfigRepository, ["delegate"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_hydra_still_has_each_function_that_is_replaced(name):
    function, parameters = REPLACED[name]
    found = list(inspect.signature(function).parameters)
    assert found == parameters, f"Hydra has changed {name} to {found}: read gpt/sweeps/hydra_patches.py"


@pytest.mark.parametrize("name", hydra_patches.LAUNCHERS)
def test_launchers_of_this_project_are_plugins_and_nothing_else_of_it_is(name):
    assert Plugins.instance().class_name_to_class[name].__module__.startswith("gpt.sweeps.")
    assert Plugins.is_in_toplevel_plugins_module(name)
    assert Plugins.is_in_toplevel_plugins_module("hydra_plugins.theirs.Launcher")
    assert not Plugins.is_in_toplevel_plugins_module("gpt.sweeps.selection.SelectingLauncher")


PROGRAM = """
import json, pickle, sys
import gpt.config.launch  # as each process of a launcher does, before it composes a job
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
Plugins.instance()
answers = []
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        loader, config, jobs = pickle.load(file)
    for job in jobs:
        try:
            cfg = OmegaConf.to_container(loader.load_sweep_config(config, job))
            del cfg["hydra"]
        except Exception as error:
            cfg = f"{type(error).__name__}: {error}"
        answers.append(cfg)
print(json.dumps(answers))
"""


@pytest.mark.parametrize("pickled_by", ["pickle", "cloudpickle"])  # the second is that of joblib and submitit
def test_the_processes_of_a_launcher_get_the_snapshot_with_the_loader(conf, tmp_path, pickled_by):
    module = pytest.importorskip(pickled_by)
    (tmp_path / "frozen").write_bytes(module.dumps((*opened(conf), JOBS)))
    (tmp_path / "other").write_bytes(module.dumps((*opened(conf, frozen=False), JOBS)))
    shutil.move(conf / "model" / "a.yaml", conf / "gone")
    (conf / "train.yaml").write_text("seed: 55\n")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "frozen"), str(tmp_path / "other")],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert answers[:4] == EXPECTED
    assert len(answers) == 8 and not any(answer in EXPECTED for answer in answers[4:])
