"""Composes the jobs of a sweep as Hydra does, and what each would cost, before any of them runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose as compose_one
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import filter_overrides
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gpt.config import environment
from gpt.config.fields import with_texts
from gpt.errors import UserError
from gpt.files.paths import PROJECT_ROOT
from gpt.machine.cost import Cost
from gpt.sweeps import jobs


def is_known(config: DictConfig) -> bool:
    """Whether the jobs of a sweep are known before it runs; those of other sweepers than Hydra's own cannot."""
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def axes(config: DictConfig, loader: ConfigLoader) -> list[Override]:
    """What varies from job to job and what does not, of an experiment's file and of the command line."""
    lines = [f"{key}={axis}" for key, axis in (config.hydra.sweeper.params or {}).items()]
    typed = OmegaConf.to_container(config.hydra.overrides.task)  # ${oc.env:NAME} stays as it was typed
    return OverridesParser.create(config_loader=loader).parse_overrides([*lines, *typed])


def all_jobs(config: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """The overrides of each job, as Hydra's basic sweeper makes them. Raises UserError where they are not known."""
    if not is_known(config):
        raise UserError("dry_run=true", "hydra/sweeper", "only a basic sweep is known before it runs")
    return BasicSweeper.split_arguments(axes(config, loader), None)[0]


def compose(config: DictConfig, loader: ConfigLoader, overrides: list[str], number: int) -> DictConfig:
    """The configuration of one job."""
    job = loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    return job


def of_script(script: str, overrides: list[str]) -> DictConfig:
    """The configuration of a script, in a process that runs another one."""
    if GlobalHydra.instance().is_initialized():
        return compose_one(script, overrides)
    with initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
        return compose_one(script, overrides)


def as_job(config: DictConfig, number: int, swept: set[str]) -> jobs.Job:
    """The record of a job that has not started. `swept`: the keys that are not the same for all jobs."""
    typed = filter_overrides(OmegaConf.to_container(config.hydra.overrides.task))
    overrides = [override for override in typed if not override.startswith("sweep.")]
    name = " ".join(override for override in overrides if jobs.override_key(override) in swept)
    folder = Path(str(config.hydra.sweep.dir)).absolute() / str(config.hydra.sweep.subdir)
    return jobs.Job(folder, number, overrides, identity(config), name)


def identity(config: DictConfig) -> dict[str, Any]:
    """The settings by which a job is known, see gpt/sweeps/jobs.py."""
    values = {}
    for key in config:
        if key not in jobs.VOLATILE and not OmegaConf.is_missing(config, key):
            values[key] = config[key]
            if OmegaConf.is_config(values[key]):
                try:
                    texts = environment.unresolved(values[key])
                    values[key] = with_texts(OmegaConf.to_container(values[key], resolve=True), texts)
                except OmegaConfBaseException:  # an interpolation that leads nowhere is reported when the job starts
                    values[key] = OmegaConf.to_container(values[key])
    return jobs.identity(values)


def cost(main: Callable[[DictConfig], Any], config: DictConfig, directory: Path) -> Cost:
    """What a script would answer to dry_run=true. `directory`: where the run would write. Raises UserError for what
    would stop the run."""
    config = config.copy()
    OmegaConf.set_readonly(config.hydra, False)  # HydraConfig makes it read-only where it has had this configuration
    with open_dict(config):
        config.hydra.runtime.output_dir = str(directory.absolute())
        config.dry_run = True
    return main(without_hydra(config))


def without_hydra(config: DictConfig) -> DictConfig:
    """What Hydra hands to a script of a composed configuration: all but its own part, which becomes the current one."""
    HydraConfig.instance().set_config(config)
    config = config.copy()
    with open_dict(config):
        del config["hydra"]
    return config
