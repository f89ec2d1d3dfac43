"""Runs tasks of EleutherAI's lm-evaluation-harness on the very weights that are loaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from gpt.config.fields import Count, Distinct, Int, Text, section
from gpt.errors import ENVIRONMENT, UserError
from gpt.evaluation import statistics
from gpt.evaluation.registry import Kind
from gpt.files import paths

if TYPE_CHECKING:
    from gpt.evaluation.statistics import Figure, Measure
    from gpt.evaluation.task import Task

# How the harness makes one figure of the log-likelihoods, or of the pairs of one and a weight, of all documents.
OF_LIKELIHOODS: dict[str, Callable[[Any], Any]] = {
    "perplexity": lambda x: np.exp(-x),
    "word_perplexity": lambda x: np.exp(-x),
    "byte_perplexity": lambda x: np.exp(-x),
    "bits_per_byte": lambda x: -x / math.log(2),
}


@section
class Evaluation(Kind):
    """evaluate=tasks. Units are tasks."""

    names: Annotated[list[Text], Field(min_length=1), Distinct]
    folder: Text | None
    num_fewshot: Annotated[Int, Field(ge=0)] | None
    limit: Count | None

    def asked(self, task: Task) -> dict[str, Any]:
        """The tasks, and the sha256 of the local files that may define them."""
        digest = hashlib.sha256()
        for path in sorted(self._folder.rglob("*")) if self._folder else []:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(self._folder)}\0".encode() + path.read_bytes())
        source = f"lm-evaluation-harness {self._version()}: {', '.join(self.names)}"
        return {"questions": {"source": source, "documents": len(self.names), "sha256": digest.hexdigest()}}

    def batches(self, task: Task) -> list[list[int]]:
        return [[i] for i in range(len(self.names))]

    def compute(self, task: Task, units: list[int]) -> list[dict[str, Any]]:
        """{"samples": the harness's figures of each document} of each task. Raises UserError: 2 for a task that is not
        known, 5 for one that cannot be had, as without network."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from gpt.evaluation.harness import HarnessModel

        manager, rows = TaskManager(include_path=str(self._folder) if self._folder else None), []
        for name in (self.names[i] for i in units):
            if name not in manager.all_tasks:
                raise UserError(f"no task {name}", "evaluate.tasks.names", "see `lm_eval ls tasks`, or give a folder")
            try:
                found = simple_evaluate(
                    model=HarnessModel(task), tasks=[name], num_fewshot=self.num_fewshot, limit=self.limit,
                    task_manager=manager, bootstrap_iters=0, log_samples=True,
                )  # fmt: skip
            except UserError:
                raise
            except Exception as error:  # any of the libraries below it may raise whatever it likes
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                remedy = "a task whose data is in a local folder needs no network: evaluate.tasks.folder=..."
                raise UserError(f"task {name} cannot be run", reason, remedy, ENVIRONMENT) from error
            samples = [
                {"task": own, "document": sample["doc_id"], "filter": sample["filter"],
                 "figures": {key: _plain(sample[key]) for key in sample["metrics"]}}
                for own, listed in found["samples"].items() for sample in listed
            ]  # fmt: skip
            rows.append({"samples": samples})
        return rows

    def finish(self, task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each document of each task."""
        samples = [sample for row in rows for sample in row["samples"]]
        return [{"id": f"{s['task']}/{s['filter']}/{s['document']}"} | s for s in samples]

    def measures(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Measure]]:
        """Of each task and figure, over the documents of that task."""
        found: dict[str, Measure] = {}
        keys = dict.fromkeys((row["task"], row["filter"], name) for row in rows for name in row["figures"])
        for name, kept, key in keys:
            values = [row["figures"].get(key) if (row["task"], row["filter"]) == (name, kept) else None for row in rows]
            label = f"{name}: {key}" if kept == "none" else f"{name}: {key} ({kept})"
            pairs = [value if isinstance(value, list) else [value, 1.0] for value in values if value is not None]
            zeros = [[0.0, 0.0] if v is None else v if isinstance(v, list) else [v, 1.0] for v in values]
            if all(isinstance(x, int | float) for pair in pairs for x in pair):
                above, below = zip(*zeros, strict=True)
                found[label] = statistics.ratio(above, below, OF_LIKELIHOODS.get(key, lambda x: x))
        return {"model": found}

    def remarks(self, task: Task, rows: list[dict[str, Any]], figures: dict[str, dict[str, Figure]]) -> list[str]:
        counts = {name: sum(row["task"] == name for row in rows) for name in dict.fromkeys(row["task"] for row in rows)}
        return [f"{name}: {n:,} documents" for name, n in counts.items()]

    @property
    def _folder(self) -> Path | None:
        if self.folder is None:
            return None
        folder = paths.absolute(self.folder)
        if not folder.is_dir():
            raise UserError("no such folder", str(folder), paths.elsewhere(folder) or "it has a .yaml for each task")
        return folder

    def _version(self) -> str:
        try:
            return version("lm_eval")
        except PackageNotFoundError:
            remedy = "pip install -r requirements.txt -r requirements-tasks.txt"
            raise UserError("lm-evaluation-harness is not installed", "evaluate=tasks", remedy, ENVIRONMENT) from None


def _plain(value: Any) -> Any:
    """A figure of the harness as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, bool | int | float | np.number) else str(value)
