"""Lists the kinds of evaluation: each file in gpt/evaluation/kinds/, with its values in conf/evaluate/."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar


class Kind:
    """What a kind of evaluation may leave as it is."""

    headline: ClassVar[str | None] = None  # the name of the figure that stands for all of them; None: the first one

    def asked(self, task: Any) -> dict[str, Any] | None:
        """What results say of their questions, of a kind that needs no data; None: see running.asked_of_data."""
        return None

    def recorded(self) -> dict[str, Any]:
        """What else is in the results."""
        return {}


@cache
def kinds() -> dict[str, type]:
    """The name of each kind -> its class `Evaluation`, a Kind, whose fields are its settings.

    What it offers to gpt/evaluation/running.py:
    - `batches(task)`: lists of the numbers of the units (questions or windows of text) that are computed together;
    - `compute(task, units)`: a row of JSON for each of these units, with what the model makes of it;
    - `finish(task, rows)`: the rows of all units, with all that is scored, one for each question;
    - `measures(rows)`: {system: {name: gpt.evaluation.statistics.Measure}}, of the model and of its baselines;
    - `remarks(task, rows, figures)`: sentences on what the figures mean.
    """
    package = import_module("gpt.evaluation.kinds")
    names = sorted(module.name for module in iter_modules(package.__path__))
    return {name: import_module(f"gpt.evaluation.kinds.{name}").Evaluation for name in names}
