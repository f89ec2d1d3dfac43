"""Explains what is missing or goes wrong in launchers and sweepers that do not come with Hydra, in one line.

requirements-sweeps.txt has those that conf/hydra/launcher/ and conf/hydra/sweeper/ configure.
"""

import logging
import sys
import traceback
from importlib.util import find_spec

from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from gpt.errors import ENVIRONMENT, USAGE, UserError, one_line

# The least value of each that is not null. Optuna divides by one of the first two.
NUMBERS = {"sweeper.n_trials": 1, "sweeper.n_jobs": 1, "launcher.nproc_per_node": 1, "launcher.max_restarts": 0,
           "launcher.cpus_per_process": 1, "launcher.gpus_per_process": 0}  # fmt: skip

_choices: dict[str, str] = {}  # of this process's sweep: "hydra/sweeper=optuna" by slot


def check(config: DictConfig) -> None:
    """Raises UserError for plugins that a sweep needs and that are not installed, and for numbers that end in one."""
    installed = Plugins.instance().class_name_to_class
    missing = []
    for slot in ("sweeper", "launcher"):
        _choices[slot] = f"hydra/{slot}={config.hydra.runtime.choices.get(f'hydra/{slot}')}"
        if str(config.hydra[slot]._target_) not in installed:
            missing.append(f"{_choices[slot]}: not installed: pip install -r requirements-sweeps.txt")
    if _choices["launcher"] == "hydra/launcher=ray" and find_spec("ray") is None:
        missing.append("hydra/launcher=ray: not installed: pip install -r requirements-ray.txt")
    if missing:
        raise UserError("; ".join(missing))
    for key, least in NUMBERS.items():
        slot, _, name = key.partition(".")
        number = config.hydra[slot].get(name)
        if number is not None and (type(number) is not int or number < least):
            raise UserError(f"hydra.{key}={number}: a whole number from {least} on")


def silence() -> None:
    """Silences what plugins say of each job, because gpt/sweeps/callback.py says it too."""
    logging.getLogger("hydra_plugins").setLevel(logging.ERROR)
    if "optuna" in sys.modules:
        sys.modules["optuna"].logging.set_verbosity(logging.ERROR)


def explain(error: Exception) -> UserError | None:
    """What was raised in a plugin, and not by this project. Jobs keep their errors to themselves."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = next((name for name in reversed(modules) if name.startswith(("gpt.", "hydra_plugins."))), "")
    if not _choices or not last.startswith("hydra_plugins."):
        return None
    is_of_values = isinstance(error, ValueError | TypeError | AssertionError | ArithmeticError)
    what = f"{_choices['launcher' if 'launcher' in last else 'sweeper']}: {type(error).__name__}: {error}"
    return UserError(one_line(what), code=USAGE if is_of_values else ENVIRONMENT)


def has_only_failed_jobs(error: Exception) -> bool:
    """Whether it is Optuna's complaint after all jobs have failed, as they have reported."""
    return str(error) == "No trials are completed yet."
