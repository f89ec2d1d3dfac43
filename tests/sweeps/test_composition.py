"""The jobs of a sweep as Hydra composes them: which there are, how each is recorded, what each would cost."""

import math
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from gpt.config import launch, schema
from gpt.errors import UserError
from gpt.sweeps import composition, jobs


def sweep(*overrides, config_dir=ROOT / "conf"):
    """(configuration, loader) of a sweep with these overrides."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration("train", list(overrides), RunMode.MULTIRUN), loader


@pytest.fixture(scope="module")
def grid():
    return sweep("sweep.name=x", "optimizer.lr=1e-3,0.003", "++seed=1", "train.max_steps=4", "model=tiny,mini")


@pytest.fixture(autouse=True)
def hydras_own_configuration():
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


def test_the_jobs_are_those_of_hydras_sweeper_in_its_order(grid):
    assert composition.all_jobs(*grid) == [
        ["sweep.name=x", f"optimizer.lr={lr}", "++seed=1", "train.max_steps=4", f"model={model}"]
        for lr in ("0.001", "0.003") for model in ("tiny", "mini")
    ]  # fmt: skip


def test_an_experiment_brings_its_axes_and_one_on_the_command_line_takes_the_place_of_it():
    axes = yaml.safe_load((ROOT / "experiments" / "lr_vs_context.yaml").read_text())["hydra"]["sweeper"]["params"]
    n_values = {key: len(str(axis).split(",")) for key, axis in axes.items()}
    every = composition.all_jobs(*sweep("experiments=lr_vs_context"))
    assert len(every) == math.prod(n_values.values()) == len(set(map(tuple, every)))
    fewer = composition.all_jobs(*sweep("experiments=lr_vs_context", "optimizer.lr=0.5"))
    assert len(fewer) == len(every) // n_values["optimizer.lr"]
    assert all("optimizer.lr=0.5" in overrides for overrides in fewer)


def test_the_jobs_of_a_sweeper_that_chooses_as_it_goes_are_not_known():
    chosen = sweep("hydra/sweeper=optuna", "optimizer.lr=interval(0.001,0.1)")
    assert not composition.is_known(chosen[0]) and composition.is_known(sweep("seed=1,2")[0])
    with pytest.raises(UserError, match="only a basic sweep is known before it runs"):
        composition.all_jobs(*chosen)


def test_a_job_is_recorded_by_its_settings_in_a_folder_of_their_name(grid):
    every = composition.all_jobs(*grid)
    configs = [composition.compose(*grid, overrides, 10 + number) for number, overrides in enumerate(every)]
    found = [composition.as_job(cfg, number, {"optimizer.lr", "model"}) for number, cfg in enumerate(configs)]
    assert [cfg.hydra.job.num for cfg in configs] == [10, 11, 12, 13] == [int(cfg.hydra.job.id) for cfg in configs]
    assert [job.name for job in found] == [
        "optimizer.lr=0.001 model=tiny", "optimizer.lr=0.001 model=mini",
        "optimizer.lr=0.003 model=tiny", "optimizer.lr=0.003 model=mini",
    ]  # fmt: skip
    assert len({job.id for job in found}) == 4 and {job.status for job in found} == {"new"}
    for number, (job, cfg) in enumerate(zip(found, configs, strict=True)):
        assert job.folder == ROOT / "outputs" / "sweeps" / "x" / jobs.name_of(job.config)
        assert job.folder == Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir and not job.folder.exists()
        assert (job.number, job.config["optimizer.lr"]) == (number, float(f"0.00{1 if number < 2 else 3}"))
        assert job.overrides == [override for override in every[number] if not override.startswith("sweep.")]


def test_what_makes_no_difference_to_a_job_makes_none_to_its_folder(grid):
    overrides = composition.all_jobs(*grid)[0]
    folders = {
        composition.as_job(composition.compose(*grid, [*overrides, *more], 0), 0, set()).id
        for more in ([], ["sweep.pause_at=100"], ["wandb.tags=[a]"], ["optimizer.lr=1e-3"], ["hydra.job.num=5"])
    }
    assert len(folders) == 1
    assert composition.as_job(composition.compose(*grid, [*overrides, "seed=2"], 0), 0, set()).id not in folders


def test_the_same_job_of_another_sweep_has_the_same_name_in_another_directory():
    pair = [composition.as_job(composition.compose(*sweep(f"sweep.name={name}"), [f"sweep.name={name}"], 0), 0, set())
            for name in "ab"]  # fmt: skip
    assert pair[0].id == pair[1].id and [job.folder.parent.name for job in pair] == ["a", "b"]


def test_what_is_missing_or_leads_nowhere_is_left_for_the_job_to_report():
    values = {"a": 1.0, "b": {"c": "${nope}", "d": 2}, "lr": "???", "hydra": {"x": 1}, "out_dir": "${nope}"}
    assert composition.identity(OmegaConf.create(values)) == {"a": 1, "b.c": "${nope}", "b.d": 2}
    assert composition.identity(OmegaConf.create({"a": 1, "b": {"c": "${a}"}})) == {"a": 1, "b.c": 1}


def test_what_a_job_costs_is_what_the_script_answers_to_dry_run(tmp_path, grid):
    seen = []

    def main(cfg):
        seen.append((cfg, HydraConfig.get().runtime.output_dir, launch.load(cfg, schema.TrainConfig)))
        return "the cost"

    cfg = composition.compose(*grid, composition.all_jobs(*grid)[1], 0)
    before = OmegaConf.to_container(cfg, resolve=False)
    assert composition.cost(main, cfg, tmp_path / "job") == "the cost"
    [(plain, output_dir, typed)] = seen
    assert "hydra" not in plain and plain.dry_run is True
    assert output_dir == typed.out_dir == str(tmp_path / "job") and not (tmp_path / "job").exists()
    assert (typed.model.name, typed.sweep.name, typed.optimizer.lr) == ("mini", "x", 0.001)
    assert OmegaConf.to_container(cfg, resolve=False) == before


def test_an_error_of_the_script_is_the_answer_too(tmp_path, grid):
    def main(cfg):
        return launch.load(cfg, schema.TrainConfig)

    cfg = composition.compose(*grid, [*composition.all_jobs(*grid)[0], "model.n_head=5"], 0)
    with pytest.raises(UserError, match=r"not divisible by model\.n_head 5"):
        composition.cost(main, cfg, tmp_path / "job")


def test_a_job_is_known_by_the_name_of_a_variable_and_not_by_what_is_in_it(monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    config, loader = sweep("sweep.name=x", "init.revision=${oc.env:TOKEN}", "seed=1,2")
    for number, overrides in enumerate(composition.all_jobs(config, loader)):
        job_config = composition.compose(config, loader, overrides, number)
        job = composition.as_job(job_config, number, {"seed"})
        assert job_config.init.revision == "s3cret" and job.config["init.revision"] == "${oc.env:TOKEN}"
        assert "s3cret" not in str(job)
