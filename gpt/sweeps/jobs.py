"""Reads and writes the jobs of a sweep, a folder each: its settings, how far it is, what came of it.

A job is known by its resolved settings, and its folder is named after them: the same settings are the same job, other
ones another. Each job's process writes its own folder only, so it does not matter where it runs.
"""

import hashlib
import json
import logging
import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt.config import run_settings
from gpt.config.places import stored, with_paths
from gpt.config.schema import ADDED, METRIC, TrainConfig, flatten, nested
from gpt.config.value_errors import holder, valid_keys
from gpt.errors import UserError
from gpt.evaluation import headlines
from gpt.files import atomic
from gpt.files.directory import is_owned
from gpt.files.jsonl import read_rows
from gpt.files.paths import PROJECT_ROOT, typed
from gpt.runs.model_card import best_row
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

FORMAT = 2  # of job.json and of the folder's name; 1 numbered the folders
# stopped: with W&B's button; paused: waits for successive halving to decide; halved: which it has, against this job;
# damaged: its job.json cannot be read.
STATUSES = ("new", "running", "interrupted", "completed", "failed", "stopped", "paused", "halved", "damaged")
LARGEST = 1e60  # beyond float32; its fourth power, in Welch's test, is a float
NUMBERS = {
    "step": int,
    "tokens": int,
    METRIC: int | float,
    "val/bpb": int | float,
    "tokens_per_second": int | float,
}
# What has no part in what comes of a job, but for the last digits.
VOLATILE = {
    "out_dir", "resume", "allow_changed", "overrides", "dry_run", "report", "evaluate_at_end", "wandb", "sweep",
    "hydra", "threads", "parallel",
}  # fmt: skip
NOTICE = "data.card.notice"  # neither has this, which came later and is for readers


@dataclass(frozen=True)
class Job:
    """A job of a sweep. Its folder holds job.json, and what any run leaves."""

    folder: Path
    number: int  # place in the sweep, from 0
    overrides: list[str]  # as typed, what all jobs have in common too
    config: dict[str, Any]  # the settings by which it is known: {"optimizer.lr": 0.001, ...}
    name: str = ""  # what was typed for this job only
    status: str = "new"
    error: str | None = None  # what went wrong, in one line
    code: int | None = None  # the exit code that it would have had alone
    log: str | None = None  # the file to read about it
    seconds: float = 0.0  # spent on it, in all starts
    fingerprint: str | None = None  # of the prepared data
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl

    @property
    def id(self) -> str:
        return self.folder.name

    @cached_property
    def best(self) -> dict[str, Any]:
        """The row of the best evaluation; empty when there is none."""
        return best_row(self.rows) or {}

    @property
    def val_loss(self) -> float | None:
        return self.best.get(METRIC)

    @cached_property
    def scores(self) -> dict[str, float]:
        """The headline figures of the evaluations of its best checkpoint."""
        return headlines.read(self.folder, self.best["step"]) if "step" in self.best else {}

    @property
    def val_bpb(self) -> float | None:
        return self.best.get("val/bpb")

    @property
    def tokens(self) -> int:
        """Read so far."""
        return max((row["tokens"] for row in self.rows if "tokens" in row), default=0)

    @property
    def tokens_per_second(self) -> float | None:
        """The median."""
        speeds = [row["tokens_per_second"] for row in self.rows if "tokens_per_second" in row]
        return statistics.median(speeds) if speeds else None

    def setting(self, key: str) -> Any:
        """The value of a setting; of a group the choice, as typed: model=mini -> "mini". None if the job has none."""
        return self.config[key] if key in self.config else self.typed.get(key)

    @cached_property
    def typed(self) -> dict[str, str]:
        """{key: value} of the overrides."""
        return {override_key(override): override.partition("=")[2] for override in self.overrides}

    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl: {"step", "prompt", "text"}."""
        return read_rows(self.folder / "samples.jsonl")


STORED = [f.name for f in fields(Job) if f.name not in ("folder", "rows")]
TYPES = {"number": int, "overrides": list, "config": dict, "name": str, "seconds": int | float}  # others: text or None


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run by which it is known as a job, flat, from all of its settings, nested.

    1e-3 and 0.001 are one number, and so are 100 and 1e2. Paths inside the project are relative to it. A budget in
    tokens that another budget overrules is left out.
    """
    flat = flatten(with_paths({key: value for key, value in values.items() if key not in VOLATILE}, stored))
    flat.pop(NOTICE, None)
    if flat.get("train.max_steps") is not None or flat.get("train.max_epochs") is not None:
        flat.pop("train.max_tokens", None)
    return {key: int(v) if isinstance(v, float) and v.is_integer() and abs(v) < 2**53 else v for key, v in flat.items()}


def current(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that identify a job of an older version, as this one would have them: those that it has no more are
    left out, those that came since have the value that they had. So the job is recognised, and keeps its folder."""
    config = flatten(with_paths(nested(ADDED | config), stored))
    keys = valid_keys(TrainConfig, nested(config))
    return {key: value for key, value in config.items() if key != NOTICE and (key in keys or holder(key, keys))}


def name_of(config: dict[str, Any]) -> str:
    """The name of a job's folder, 8 hexadecimal digits: one chance in ten thousand that two of 1,000 jobs share it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]


def read(directory: Path) -> list[Job]:
    """All jobs of a sweep in the order of their numbers, also while it runs. What is damaged is a warning."""
    jobs = [read_one(path.parent) for path in sorted(directory.glob("*/job.json"))]
    return sorted(jobs, key=lambda job: (job.number, job.id))


def read_one(folder: Path) -> Job:
    """The job of a folder with its metrics and its status at this moment."""
    job = load(folder)
    rows = rows_of(folder)
    if job is None:
        log.warning(f"{folder / 'job.json'} is damaged; the job is known by its other files")
        return Job(
            folder, number=10**6, overrides=[], config=settings_of(config_of(folder)), status="damaged", rows=rows
        )
    status = job.status
    if status == "running" and not is_owned(folder):  # its process has ended without a word
        status = "interrupted"
    return replace(job, status=status, rows=rows)


def write(job: Job) -> None:
    """Replaces job.json, whole or not at all. That it cannot be written is a warning: the run itself is recorded."""
    stored = {"format": FORMAT} | {key: getattr(job, key) for key in STORED}
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        atomic.write(job.folder / "job.json", json.dumps(stored, indent=2, default=str) + "\n")
    except OSError as error:
        log.warning(f"{job.folder / 'job.json'} cannot be written ({error.strerror})")


def load(folder: Path) -> Job | None:
    """The job of a folder as it was last recorded, without its metrics; None when there is no valid job.json."""
    try:
        values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        job = Job(folder, **{key: values[key] for key in STORED})
        job = replace(job, config=current(job.config))
        sound = values["format"] == FORMAT and job.status in STATUSES and 0 <= job.seconds < LARGEST
        sound &= isinstance(job.code, int | None) and all(isinstance(text, str) for text in job.overrides)
        sound &= all(isinstance(values[key], TYPES.get(key, str | None)) for key in STORED if key != "code")
        return job if sound else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """The settings that differ between the jobs, "seed" included, in the order in which they were typed.

    A choice of a file (model=mini) is one key. What changed in the files between two starts of a sweep, and was not
    typed, is found by its own key.
    """
    keys = dict.fromkeys(key for job in jobs for key in job.typed if not key.startswith(("sweep.", "wandb.", "hydra")))
    varied = [key for key in keys if len({str(job.setting(key)) for job in jobs}) > 1]
    for group in grouped(jobs, varied):
        for key in dict.fromkeys(key for job in group for key in job.config):
            if key not in varied and len({str(job.config.get(key)) for job in group}) > 1:
                varied.append(key)
    return varied


def grouped(jobs: Iterable[Job], keys: Sequence[str]) -> list[list[Job]]:
    """The jobs that agree in all of `keys` together, in the order in which they come."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(str(job.setting(key)) for key in keys), []).append(job)
    return list(groups.values())


def describe(job: Job, keys: Sequence[str]) -> str:
    """optimizer.lr=0.001 model.context_length=64"""
    return " ".join(f"{key}={as_text(job.setting(key))}" for key in keys)


def as_text(value: Any) -> str:
    """A setting as one types it, numbers with six digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def is_number(value: Any) -> bool:
    """Whether a setting is one; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def failure(job: Job) -> str:
    """Why there is nothing of a job, and where to read about it."""
    name = f"job {job.id}" + (f" ({job.name})" if job.name else "")
    if job.status == "failed":
        return f"{name} failed: {job.error}; log: {job.log}"
    text = {"new": "has not begun", "running": "is running", "damaged": "has a damaged job.json"}.get(job.status)
    return f"{name} {text or 'did not end: it was interrupted or killed'}; log: {job.folder}"


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run as a job, from the settings in its config.yaml; empty where those are none."""
    try:
        return current(identity(values)) if values else {}
    except (ValueError, RecursionError):
        return {}


def generate_command(job: Job) -> str:
    """The shell command that generates text from a job, as typed in the current folder."""
    script, checkpoint = typed(PROJECT_ROOT / "generate.py"), shlex.quote(f"checkpoint={typed(job.folder)}")
    return f'python {shlex.quote(script)} {checkpoint} prompt="..."'


def override_key(override: str) -> str:
    """+optimizer.lr=1 -> optimizer.lr"""
    return override.partition("=")[0].lstrip("+~")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl whose numbers can be computed with."""
    try:
        rows = read_rows(folder / "metrics.jsonl")
    except OSError as error:
        log.warning(f"{folder / 'metrics.jsonl'} cannot be read ({error.strerror})")
        return []
    return [row for row in rows if all(_is_usable(row[key], kind) for key, kind in NUMBERS.items() if key in row)]


def _is_usable(value: Any, kind: type) -> bool:
    """Whether it is one to compute with, or NaN or infinity of a kind that has them."""
    return isinstance(value, kind) and (abs(value) < LARGEST or value != value or abs(value) == math.inf)


def config_of(folder: Path) -> dict[str, Any]:
    """The settings in the config.yaml that a run writes; empty where it cannot be read."""
    try:
        return run_settings.read(folder / run_settings.FILE)
    except UserError:
        return {}
