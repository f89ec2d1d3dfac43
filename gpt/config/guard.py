"""Keeps Hydra from calling, importing or setting what a configuration names: a YAML file from anybody holds values.

Before a script's own code runs, Hydra calls every `_target_` under hydra.callbacks, hydra.launcher and hydra.sweeper,
nested ones too, and every factory and class of its two logging configurations; it imports the packages in a search
path, sets the environment variables of hydra.job.env_set (LD_PRELOAD is one), and unpickles for --experimental-rerun.
Its plugins for sweeps call more: the Optuna sweeper a function named by custom_search_space, the submitit launcher a
shell with the commands in setup, and a batch script in which a line break within a value begins a command.
Each job of a sweep is composed anew. All of that passes the functions that `install` replaces. It also takes away the
interpolation ${oc.env:NAME}: what a configuration says is written to files and to Weights & Biases.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt.errors import UserError

CALLBACKS = {"sweep": {"_target_": "gpt.sweeps.callback.SweepCallback"}}  # conf/hydra/callbacks/sweep.yaml
SLOTS = (("hydra", "launcher"), ("hydra", "sweeper"))
PLUGINS = [(*slot, "_target_") for slot in SLOTS]
PLUGIN = re.compile(r"(hydra_plugins|hydra\._internal\.core_plugins)(\.\w+)+")  # installed by a person, on purpose
# What the Optuna sweeper asks for values. CmaEsSampler is left out, as it unpickles what it finds in the storage.
SAMPLER = ("hydra", "sweeper", "sampler", "_target_")
SAMPLERS = [f"optuna.samplers.{name}" for name in ("TPESampler", "RandomSampler", "GridSampler", "NSGAIISampler")]
# What a plugin does with any other key is not known: submitit takes shell commands in setup and additional_parameters.
KEYS = {
    "launcher": {
        "_target_", "n_jobs", "submitit_folder", "name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb",
        "partition", "account", "qos", "constraint", "exclude", "array_parallelism",
    },
    "sweeper": {
        "_target_", "params", "max_batch_size", "sampler", "n_trials", "n_jobs", "direction", "max_failure_rate",
        "storage", "study_name", "search_space", "custom_search_space",
    },
}  # fmt: skip
STORAGE = re.compile(r"sqlite:///[^?]+")  # others unpickle (redis://), or import what the address names
PACKAGE = re.compile(r"pkg://(conf|hydra\.conf|hydra_plugins(\.\w+)+)")
# What an interpolation yields is known only when Hydra uses it, and it can be a section with a `_target_`. By Hydra's
# own types these two are texts.
TEXTS = re.compile(r"\$\{hydra\.(sweep\.dir|job\.name)\}")


def install() -> None:
    """From now on no composition and no search path of this process gets past the checks below."""
    if not hasattr(ConfigLoaderImpl.load_configuration, "__wrapped__"):
        ConfigLoaderImpl.load_configuration = _checked(ConfigLoaderImpl.load_configuration)
        ConfigRepository.initialize_sources = _without_packages(ConfigRepository.initialize_sources)
        sys.modules["hydra.main"]._get_rerun_conf = _no_pickles  # `hydra.main` itself is the function
        OmegaConf.register_new_resolver("oc.env", _no_environment, replace=True)


def refusals(cfg: DictConfig) -> list[str]:
    """One phrase for each key of a composed configuration, Hydra's part included, that is more than a value."""
    values = OmegaConf.to_container(cfg, resolve=False)
    own = values.get("hydra")
    if not isinstance(own, dict):
        return ["hydra: it is a section, and has keys of its own"]
    found = []
    for path, value in _leaves(values, ()):
        is_callback = path == ("hydra", "callbacks", "sweep", "_target_") and value == CALLBACKS["sweep"]["_target_"]
        is_plugin = path in PLUGINS and PLUGIN.fullmatch(str(value))
        is_sampler = path == SAMPLER and value in SAMPLERS
        if "_target_" in path and not is_callback and not is_plugin and not is_sampler:
            found.append(f"{'.'.join(path)}={value}: a configuration names nothing to call")
        elif path[:2] in SLOTS and "$" in TEXTS.sub("", str(value)):
            found.append(f"{'.'.join(path)}={value}: no interpolation here, it could become something to call")
    if own.get("callbacks") not in (None, {}, CALLBACKS):
        found.append("hydra.callbacks: there is one, in conf/hydra/callbacks/sweep.yaml")
    for name in ("launcher", "sweeper"):
        if not isinstance(own.get(name), dict):
            found.append(f"hydra.{name}: it is a section, and names a plugin of Hydra")
    if not found:
        found += _refused_of_plugins(cfg)
    for name in ("job_logging", "hydra_logging"):
        if not _is_harmless_logging(own.get(name), name):
            found.append(f"hydra.{name}: only Hydra's own choices, unchanged; hydra/{name}=none is the one to use here")
    for name in ("env_set", "env_copy"):
        if own["job"].get(name):
            found.append(f"hydra.job.{name}: a configuration sets no environment variables; the shell does")
    if not isinstance(own.get("verbose"), bool | str | list):
        found.append("hydra.verbose: true, false or the names of loggers")
    return found


def _refused_of_plugins(cfg: DictConfig) -> list[str]:
    """What a launcher or a sweeper would do more with than read a value. Interpolations have been looked at before."""
    found = []
    for name, known in KEYS.items():
        try:
            section = OmegaConf.to_container(cfg.hydra[name], resolve=True)
        except OmegaConfBaseException as error:
            found.append(f"hydra.{name}: {' '.join(str(error).split())}")
            continue
        for key, value in section.items():
            where = f"hydra.{name}.{key}"
            if key not in known:
                found.append(f"{where}: only what conf/hydra/{name} has, because others can run commands")
            elif name == "launcher" and not _is_plain(value):
                found.append(f"{where}: a number or one line of text, because it becomes a line of a batch script")
        if section.get("custom_search_space") is not None:
            found.append(f"hydra.{name}.custom_search_space: a configuration names nothing to call")
        storage = section.get("storage")
        if storage is not None and not (isinstance(storage, str) and STORAGE.fullmatch(storage)):
            found.append(f"hydra.{name}.storage: null, or a file as sqlite:///${{hydra.sweep.dir}}/optuna.db")
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and value.isprintable())


def _is_harmless_logging(config: Any, name: str) -> bool:
    """Whether a logging configuration is switched off, or comes with Hydra: a file handler can overwrite any file."""
    if isinstance(config, dict) and "root" in config and config["root"] is None:
        return True
    files = (Path(hydra.__file__).parent / "conf" / "hydra" / name).glob("*.yaml")
    return config in [yaml.safe_load(file.read_text()) for file in files]


def _leaves(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of all that is nested in dicts and lists; empty ones are values."""
    if isinstance(values, dict | list) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, values


def _checked(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    @functools.wraps(load)
    def load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        try:
            cfg = load(self, *args, **kwargs)
        except HydraException:
            raise
        except Exception as error:  # what a file can do that is no YAML, not UTF-8 or no mapping
            raise ConfigCompositionException(_reason(error)) from None
        found = refusals(cfg)
        if found:
            raise ConfigCompositionException("; ".join(found))
        return cfg

    return load_configuration


def _without_packages(initialize: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialize)
    def initialize_sources(self: ConfigRepository, config_search_path: Any) -> None:
        for entry in config_search_path.get_path():
            if entry.path.startswith("pkg://") and not PACKAGE.fullmatch(entry.path):
                raise ConfigCompositionException(f"hydra.searchpath: {entry.path} would import a package; use file://")
        initialize(self, config_search_path)

    return initialize_sources


def _no_pickles(file: str, overrides: list[str]) -> NoReturn:
    raise UserError("--experimental-rerun reads a pickle, which can run anything", file, "give the overrides instead")


def _no_environment(*arguments: Any) -> NoReturn:
    raise ValueError("a configuration does not read the environment, the shell does")


def _reason(error: Exception) -> str:
    """Why a configuration cannot be composed, in one line, with the place in the file where the error names it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__} while the configuration is composed: {' '.join(str(error).split())}"
