"""Launchers and sweepers that do not come with Hydra (requirements-sweeps.txt): whether they are there, what they say.

conf/hydra/launcher/ and conf/hydra/sweeper/ hold all of their settings that there are here.
"""

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from gpt.errors import ENVIRONMENT, USAGE, UserError
from gpt.files.paths import PROJECT_ROOT

CONF = PROJECT_ROOT / "conf"
SLOTS = ("hydra/sweeper", "hydra/launcher")


def install() -> None:
    """From now on what is missing or goes wrong in a plugin is an error for people, and ours are the only settings."""
    if not hasattr(Plugins.instantiate_sweeper, "__wrapped__"):
        Plugins.instantiate_sweeper = _explained(Plugins.instantiate_sweeper)
        ConfigStore.store = _unless_ours(ConfigStore.store)


def missing(cfg: DictConfig) -> list[str]:
    """One phrase for each plugin that a sweep with this configuration needs and that is not installed."""
    installed = Plugins.instance().class_name_to_class
    lacking = [slot for slot in SLOTS if str(cfg.hydra[slot.partition("/")[2]]._target_) not in installed]
    return [f"{_choice(cfg, slot)}: not installed: pip install -r requirements-sweeps.txt" for slot in lacking]


def _choice(cfg: DictConfig, slot: str) -> str:
    return f"{slot}={cfg.hydra.runtime.choices.get(slot)}"


def _explained(make: Callable[..., Sweeper]) -> Callable[..., Sweeper]:
    @functools.wraps(make)
    def instantiate_sweeper(self: Plugins, *, config: DictConfig, **kwargs: Any) -> Sweeper:
        lacking = missing(config)
        if lacking:
            raise ConfigCompositionException("; ".join(lacking))
        for key in ("n_trials", "n_jobs"):  # Optuna divides by one of them
            number = config.hydra.sweeper.get(key, 1)
            if not isinstance(number, int) or number < 1:
                raise UserError(f"hydra.sweeper.{key}={number}: a whole number from 1 on")
        with _errors(config):
            sweeper = make(self, config=config, **kwargs)
        sweep = sweeper.sweep

        def explained_sweep(arguments: list[str]) -> Any:
            _hush()
            with _errors(config):
                return sweep(arguments)

        sweeper.sweep = explained_sweep
        return sweeper

    return instantiate_sweeper


def _hush() -> None:
    """What gpt/sweeps/callback.py says of each job, plugins need not say as well."""
    logging.getLogger("hydra_plugins").setLevel(logging.ERROR)
    if "optuna" in sys.modules:
        sys.modules["optuna"].logging.set_verbosity(logging.ERROR)


@contextlib.contextmanager
def _errors(cfg: DictConfig) -> Iterator[None]:
    """Makes what is raised in a plugin, and not by a job or by us, a UserError."""
    try:
        yield
    except (HydraException, UserError):
        raise
    except Exception as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        last = next(name for name in reversed(modules) if name.startswith(("gpt.", "hydra_plugins.")))
        if last.startswith("gpt."):
            raise
        if str(error) == "No trials are completed yet.":  # Optuna's, after all jobs have failed, as they have reported
            return
        of_values = isinstance(error, ValueError | TypeError | AssertionError | ArithmeticError)
        what = " ".join(f"{_choice(cfg, SLOTS['launcher' in last])}: {type(error).__name__}: {error}".split())
        raise UserError(what, code=USAGE if of_values else ENVIRONMENT) from error


def _unless_ours(store: Callable[..., None]) -> Callable[..., None]:
    """Hydra would merge a file of conf/ with what a plugin registers under the same name, and warn of it."""

    @functools.wraps(store)
    def store_unless_ours(self: ConfigStore, name: str, *args: Any, group: str | None = None, **kwargs: Any) -> None:
        if not (CONF / (group or "") / f"{name}.yaml").exists():
            store(self, name, *args, group=group, **kwargs)

    return store_unless_ours
