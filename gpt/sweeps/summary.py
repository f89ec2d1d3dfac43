"""Closes a sweep: writes the files beside its jobs' folders, and prints what has come of it."""

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path

from gpt.config.schema import METRIC, WandbConfig
from gpt.errors import UserError
from gpt.files import atomic
from gpt.files.paths import PROJECT_ROOT
from gpt.runs import run_log
from gpt.sweeps import jobs, leaderboard, prediction, report, tables
from gpt.sweeps.leaderboard import Results
from gpt.terminal import console, figures

log = logging.getLogger(__name__)

ENDED = ("completed", "stopped", "halved")  # as somebody has wanted it


def close(directory: Path, wandb: WandbConfig | None = None) -> int:
    """Writes the files, prints the table and, last, the directory. Returns 1 if a job failed or did not end, else 0.

    `wandb`: where the leaderboard goes as well, as a run of its own. Raises UserError where there is no sweep.
    """
    results = collect(directory)
    write(results)
    show(results)
    if wandb:
        mirror(results, wandb)
    print(console.escape(str(directory)), flush=True)
    return 1 if results.failures else 0


def collect(directory: Path) -> Results:
    """What the jobs of a sweep come to at this moment. Raises UserError where there is none."""
    all_jobs = jobs.read(directory)
    if not all_jobs:
        raise UserError("there is no sweep", str(directory), f"there are: {', '.join(_others(directory)) or 'none'}")
    entries = leaderboard.entries(all_jobs)
    predicted = prediction.predictions(all_jobs)
    predictions = list(map(str, predicted))
    if len(predicted) > 1 and (checked := prediction.held_out(predicted)):
        predictions.append(checked)
    failures = [jobs.failure(job) for job in all_jobs if job.status not in ENDED]
    verdict, caveats = leaderboard.verdict(entries), leaderboard.caveats(all_jobs)
    return Results(directory, all_jobs, entries, verdict, caveats, predictions, failures, command(directory))


def write(results: Results) -> None:
    """leaderboard.md, leaderboard.csv, sweep.csv, curves.png, heatmap.png and report.html."""
    directory, entries = results.directory, results.entries
    title = f"{results.title}: val/loss"
    _try(atomic.write, directory / "leaderboard.csv", tables.entries_csv(entries))
    _try(atomic.write, directory / "leaderboard.md", tables.markdown(results))
    _try(atomic.write, directory / "sweep.csv", tables.jobs_csv(results.jobs))
    keys, evaluated = jobs.varied_keys(results.jobs), [job for job in results.jobs if job.val_loss is not None]
    if evaluated:
        curves = {results.label(job, keys): job.rows for job in evaluated}
        _try(lambda path: figures.curves(curves, path, title), directory / "curves.png")
    if grid := tables.grid(entries):
        _try(lambda path: figures.heatmap(grid, path, title), directory / "heatmap.png")
    _try(lambda path: report.write(results), directory / report.NAME)


def show(results: Results) -> None:
    """The table, and below it what is to be said about it."""
    entries = results.entries
    print("\n" + console.table(tables.rows(entries), tables.columns(entries), tables.LEAST_IMPORTANT) + "\n")
    say(results)
    if results.failures:
        counts = f"{len(results.failures)} of {len(results.jobs)} jobs are not done"
        print(f"{counts}; to go on: {console.escape(results.command)}")


def say(results: Results) -> None:
    """The sentences about the jobs, where the best one is, and how to generate text from it."""
    for text in [results.verdict, *results.caveats, *results.agreement, *results.predictions]:
        print(console.wrapped(console.escape(text)))
    if best := results.best:
        print(f"best job: {console.escape(str(best.folder))}")
        print(f"generate from it: {console.escape(jobs.generate_command(best))}")
    for text in results.failures:
        print(console.escape(text))


def mirror(results: Results, wandb: WandbConfig) -> None:
    """The leaderboard and the figures to W&B."""
    columns = tables.columns(results.entries)
    rows = [[row.get(column) for column in columns] for row in tables.rows(results.entries)]
    best = next((entry for entry in results.entries if entry.losses), None)
    values = {METRIC: best.mean, "val/bpb": best.bpb, "settings": best.settings} if best else {}
    configs, statuses = [job.config for job in results.jobs], [job.status for job in results.jobs]
    directory = results.directory
    run_log.sweep_summary(directory, directory.name, wandb, columns, rows, configs, statuses, values)


def command(directory: Path) -> str:
    """What to type to go on with a sweep."""
    try:
        words = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))["command"]
        if not isinstance(words, list):
            raise TypeError
        words = [word for word in words if not word.startswith("sweep.name=")]  # a copied sweep has another one
        return shlex.join([*words, f"sweep.name={directory.name}"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.warning(f"{directory / 'sweep.json'} cannot be read: the command that started the sweep is not known")
        return shlex.join(["python", str(PROJECT_ROOT / "train.py"), "-m", f"sweep.name={directory.name}"])


def _try(write: Callable[..., object], path: Path, *content: str) -> None:
    """A result that cannot be written is a warning: the jobs' folders have it all."""
    try:
        write(path, *content)
    except OSError as error:
        log.warning(f"{path} cannot be written ({error.strerror})")


def _others(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.parent.glob("*/sweep.json"))
