"""The record of a sweep: job.json for each job, sweep.csv, a closing table and a figure that compares the jobs.

Hydra prints only the first failed job and knows no closing step when one has failed. So a callback records each job
when it ends, and gpt/config.py's `launch` calls `close` at the end of the process.
"""

import csv
import io
import json
import logging
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from gpt import console, durable
from gpt.errors import UserError
from gpt.rows import read_rows

log = logging.getLogger(__name__)

METRICS = ["val/loss", "val/bpb", "tokens", "tokens_per_second"]
_directory: Path | None = None  # of the sweep that this process runs; Hydra hands nothing back from a callback


class DryRun(BaseException):
    """dry_run=true: raised before Hydra makes a directory. Of an Exception in a callback, Hydra makes a warning."""

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader


class SweepCallback(Callback):
    """Told by Hydra (conf/hydra/callbacks/sweep.yaml) when a sweep starts and when each of its jobs starts and ends."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._fixed: set[str] = set()  # keys that have one value in all jobs

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if OmegaConf.to_container(config, resolve=False).get("dry_run") is True:
            raise DryRun(config, GlobalHydra.instance().config_loader())  # which it forgets on the way out

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _directory
        self.on_run_start(config)
        _directory = Path(config.hydra.sweep.dir).absolute()
        typed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self._fixed = {override.key_or_group for override in typed if not override.is_sweep_override()}
        _directory.mkdir(parents=True, exist_ok=True)
        _write_csv(_directory)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        console.setup()  # a job may run in a process of its own
        self._started = time.monotonic()
        job = self._describe(config)
        log.info(f"job {job['num']}: {job['name']}")
        _write_json(Path(job["out_dir"]), job)  # stays as it is when the process is killed

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job = self._describe(config) | {"seconds": round(time.monotonic() - self._started, 3)}
        folder = Path(job["out_dir"])
        result = job_return._return_value  # `return_value` raises the job's exception again
        if job_return.status == JobStatus.COMPLETED:
            job |= {"status": "completed", "code": 0, "value": result if isinstance(result, int | float) else None}
        else:
            job |= {"status": "failed", "code": getattr(result, "code", 1), "error": _explain(result)}
            job["log"] = str(_log_of(result, folder))
            console.error(_failure(job))
            # Recorded and reported. Hydra would report the first failure a second time, skip later batches of jobs,
            # and keep each exception, hence each model, until the sweep ends. A sweeper sees a job without a value.
            job_return.status, job_return._return_value = JobStatus.COMPLETED, None
            _release(result)
        _write_json(folder, job)
        _write_csv(folder.parent)

    def _describe(self, config: DictConfig) -> dict[str, Any]:
        overrides = filter_overrides(OmegaConf.to_container(config.hydra.overrides.task))
        return {
            "num": config.hydra.job.num,
            "name": " ".join(o for o in overrides if _key(o) not in self._fixed),
            "overrides": list(overrides),
            "status": "unfinished",
            "error": None,
            "code": None,
            "seconds": None,
            "value": None,
            "log": None,
            "out_dir": config.hydra.runtime.output_dir,
        }


def jobs(config: DictConfig, loader: ConfigLoader) -> list[DictConfig]:
    """The configurations of a sweep's jobs, composed as Hydra's basic sweeper and launcher do it.

    What other sweepers will run is known only when they do: for them, raises UserError.
    """
    if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
        raise UserError("dry_run=true", "hydra/sweeper", "only a basic sweep is known before it runs")
    axes = [f"{key}={axis}" for key, axis in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*axes, *config.hydra.overrides.task])
    composed = []
    for number, chosen in enumerate(BasicSweeper.split_arguments(overrides, None)[0]):
        job = loader.load_sweep_config(config, chosen)
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        composed.append(job)
    return composed


def running() -> bool:
    """Whether this process runs a sweep that is not closed yet."""
    return _directory is not None


def close() -> int:
    """Prints the table of all jobs, writes sweep.csv and comparison.png, prints the sweep's directory last.

    Returns the exit code: 1 if a job failed or did not end, else 0.
    """
    global _directory
    if _directory is None:
        raise RuntimeError("no sweep is running")
    directory, _directory = _directory, None
    jobs = read_jobs(directory)
    _write_csv(directory)
    _draw(directory, jobs)
    columns = ["job", *varied_keys(jobs), "status", "val/loss", "val/bpb", "tokens", "tokens/s", "seconds"]
    print("\n" + console.table([_row(job) for job in jobs], columns) + "\n")
    failed = [job for job in jobs if job["status"] != "completed"]
    for job in failed:
        print(console.escape(_failure(job)))
    print(console.escape(str(directory)), flush=True)
    return 1 if failed else 0


def read_jobs(directory: Path) -> list[dict[str, Any]]:
    """Every job of a sweep with the content of its job.json and its metrics.

    `val/loss` and `val/bpb` are those of the best evaluation, `tokens` those of the whole run, `tokens_per_second` is
    the median.
    """
    jobs = []
    for path in directory.glob("*/job.json"):
        try:
            rows = read_rows(path.parent / "metrics.jsonl")
            jobs.append(json.loads(path.read_text()) | {"rows": rows} | _summarise(rows))
        except (OSError, ValueError, TypeError) as error:
            log.warning(f"{path} cannot be read ({error})")
    return sorted(jobs, key=lambda job: job["num"])


def varied_keys(jobs: list[dict[str, Any]]) -> list[str]:
    """The overridden keys whose values differ between the jobs, in the order in which they were given."""
    given = [settings(job) for job in jobs]
    keys = dict.fromkeys(key for values in given for key in values)
    return [key for key in keys if len({values.get(key) for values in given}) > 1]


def _explain(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(line.strip() for line in text.splitlines())


def _log_of(error: BaseException, folder: Path) -> Path:
    if not isinstance(error, UserError):
        return console.save_traceback(error, folder / "traceback.txt")
    return folder / "train.log" if (folder / "train.log").exists() else folder


def _failure(job: dict[str, Any]) -> str:
    name = f"job {job['num']} ({job['name']})"
    if job["status"] == "failed":
        return f"{name} failed: {job['error']}; log: {job['log']}"
    return f"{name} did not end: it was interrupted or killed; log: {job['out_dir']}"


def _release(error: BaseException | None) -> None:
    """Empties the frames of an exception: one that refers to itself would keep the job's model for a while yet."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def settings(job: dict[str, Any]) -> dict[str, str]:
    """{key: value} of a job's overrides, as typed."""
    return {_key(override): override.partition("=")[2] for override in job["overrides"]}


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    evaluations = [row for row in rows if "val/loss" in row]
    # NaN is never less than anything: a run that ended in NaN still has its best evaluation.
    best = min(evaluations, key=lambda row: (row["val/loss"] != row["val/loss"], row["val/loss"]), default={})
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return {
        "val/loss": best.get("val/loss"),
        "val/bpb": best.get("val/bpb"),
        "tokens": max((row["tokens"] for row in rows if "tokens" in row), default=None),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def _row(job: dict[str, Any]) -> dict[str, Any]:
    """A line of the closing table."""
    return {**settings(job), **job, "job": str(job["num"]), "tokens/s": job["tokens_per_second"]}


def _write_json(folder: Path, job: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        durable.write(folder / "job.json", json.dumps(job, indent=2) + "\n")
    except OSError as error:
        log.warning(f"{folder / 'job.json'} cannot be written ({error.strerror})")


def _write_csv(directory: Path) -> None:
    """sweep.csv: one line for each job, overridden keys and metrics as columns."""
    jobs = read_jobs(directory)
    keys = dict.fromkeys(key for job in jobs for key in settings(job))
    columns = ["num", "status", *keys, *METRICS, "seconds", "code", "error", "out_dir"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(settings(job) | job for job in jobs)
    path = directory / "sweep.csv"
    try:
        durable.write(path, text.getvalue())
    except OSError as error:
        log.warning(f"{path} cannot be written ({error.strerror})")


def _draw(directory: Path, jobs: list[dict[str, Any]]) -> None:
    """comparison.png, when at least one job was evaluated."""
    keys = varied_keys(jobs)
    curves = {}
    for job in jobs:
        if job["val/loss"] is not None:
            values = settings(job)
            curves[" ".join([f"{job['num']}:", *(f"{key}={values[key]}" for key in keys if key in values)])] = job[
                "rows"
            ]
    if not curves:
        return
    from gpt import figures

    try:
        figures.comparison(curves, directory / "comparison.png", f"{directory.name}: val/loss")
    except OSError as error:
        log.warning(f"{directory / 'comparison.png'} cannot be written ({error.strerror})")
