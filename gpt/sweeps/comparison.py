"""Answers `report=`: lists the runs under outputs/, or compares some of them as the jobs of a sweep are compared.

A run is read as a job is, by its files. Nothing is written into a run: a comparison has a folder of its own.
"""

import contextlib
import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt.config.schema import METRIC
from gpt.errors import ENVIRONMENT, UserError
from gpt.files import paths
from gpt.files.directory import SWEEP, has_any, is_owned
from gpt.files.json_file import read_object
from gpt.runs import catalogue, wandb_description
from gpt.sweeps import jobs, leaderboard, report, summary, tables
from gpt.sweeps.jobs import Job
from gpt.sweeps.leaderboard import Results
from gpt.terminal import console

ALL = "runs"  # report=runs
COLUMNS = ["model", "data", "lr", "steps", METRIC, "status", "folder", "W&B"]
LEAST_IMPORTANT = ["W&B", "status", "steps", "lr", "model", "data"]
ALWAYS = ("optimizer.lr", "seed")
GROUPS = ("model", "data", "optimizer", "schedule", "finetune", "objective")  # each a choice of a file


def answer(names: Sequence[str], sweeps: Path, outputs: Path = paths.PROJECT_ROOT / "outputs") -> int:
    """Prints what `report=names` stands for, and writes the files of a sweep or of a comparison. `sweeps`: the folder
    of the sweeps. Returns the exit code. Raises UserError for what is neither a run nor a sweep."""
    if list(names) == [ALL]:
        show_runs(outputs)
        return 0
    folders = [find(name, [Path.cwd(), sweeps, outputs / "runs", paths.PROJECT_ROOT]) for name in names]
    if len(folders) == 1 and has_any(folders[0], SWEEP):
        return summary.close(folders[0])
    compare(folders, outputs / "reports")
    return 0


def find(name: str, places: Sequence[Path]) -> Path:
    """The folder of the run or of the sweep that is called so in the first of `places` that has one."""
    for place in places:
        with contextlib.suppress(ValueError, OSError):
            folder = paths.absolute(name, place)
            if has_any(folder, SWEEP) or catalogue.is_run(folder):
                return folder
    raise UserError(f"no run and no sweep is called {name}", "report", "report=runs lists them")


def show_runs(outputs: Path) -> None:
    """A table of all runs below `outputs`, newest first."""
    runs = [read_run(folder, number) for number, folder in enumerate(catalogue.newest_first(outputs))]
    if not runs:
        print(f"no run yet ({console.escape(str(outputs))})")
        return
    print(console.table(list(map(_row, runs, data_names(runs))), COLUMNS, LEAST_IMPORTANT) + "\n")
    if len(leaderboard.fingerprints(runs)) > 1:
        print(console.wrapped("val/loss can be compared between runs on the same data only."))
    if (outputs / "wandb").is_dir():
        print(f"charts in the terminal: wandb leet {shlex.quote(paths.typed(outputs / 'wandb'))}")


def data_names(runs: Sequence[Job]) -> list[str]:
    """The name of each run's data, with the beginning of its fingerprint where that data was prepared differently for
    different runs."""
    names = [jobs.as_text(run.config.get("data.name", "?")) for run in runs]
    kinds = {(name, run.fingerprint) for name, run in zip(names, runs, strict=True) if run.fingerprint}
    several = {name for name in names if sum(name == other for other, _ in kinds) > 1}
    return [f"{name} {(run.fingerprint or '?')[:4]}" if name in several else name
            for name, run in zip(names, runs, strict=True)]  # fmt: skip


def _row(run: Job, data: str) -> dict[str, Any]:
    lr = run.config.get("optimizer.lr")
    return {
        "model": jobs.as_text(run.config.get("model.name", "?")),
        "data": data,
        "lr": lr if jobs.is_number(lr) else "?",
        "steps": max((row["step"] for row in run.rows if "step" in row), default=0),
        METRIC: run.val_loss,
        "status": run.status,
        "folder": paths.typed(run.folder),
        "W&B": wandb_description.remembered(run.folder),
    }


def compare(folders: Sequence[Path], reports: Path) -> None:
    """Prints the table of some runs, and writes their curves and a page into a folder of `reports`."""
    each = [job for folder in folders for job in (_jobs_of(folder) if has_any(folder, SWEEP) else [folder])]
    different = {os.path.realpath(folder): folder for folder in each}.values()  # of one run with two names, the last
    runs = [comparable(read_run(folder, number)) for number, folder in enumerate(different)]
    if len({str(sorted(run.config.items())) for run in runs}) < len(runs):  # two of the same settings are no two seeds
        runs = [replace(run, overrides=[*run.overrides, f"run={run.id}"]) for run in runs]
    entries = leaderboard.entries(runs)
    directory = reports / name_of([run.folder for run in runs])
    caveats = leaderboard.caveats(runs)
    is_fair = len(leaderboard.fingerprints(runs)) < 2
    verdict = leaderboard.verdict(entries) if is_fair else "These runs are not on the same data: none is the best."
    results = Results(directory, runs, entries, verdict, caveats, [], [], "")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the report: {error.strerror}", str(directory), code=ENVIRONMENT) from error
    summary.write(results)
    show(results)
    print(f"report: {console.escape(str(directory / report.NAME))}")


def show(results: Results) -> None:
    """A table of what came of the runs, one of the settings that differ, a column for each run, and what is to be said
    about them."""
    entries = results.entries
    numbers = [str(number) for number in range(1, len(entries) + 1)]
    rows = [{"run": number} | row for number, row in zip(numbers, tables.rows(entries), strict=True)]
    columns = [column for column in tables.columns(entries) if column not in entries[0].settings]
    important = [name for name in tables.LEAST_IMPORTANT if name != "folder"]
    print("\n" + console.table(rows, ["run", *columns], important))
    names = console.short_names(tables.setting_keys(entries))
    settings = [
        {"setting": names[key]}
        | {n: jobs.as_text(entry.settings[key]) for n, entry in zip(numbers, entries, strict=True)}
        for key in names
    ]
    print("\n" + (console.table(settings, ["setting", *numbers]) if settings else "No setting differs.") + "\n")
    summary.say(results)


def name_of(folders: Sequence[Path]) -> str:
    """The name of a comparison's folder, the same for the same runs: mine_other_1a2b3c."""
    digest = hashlib.sha256("\n".join(sorted(map(str, folders))).encode(errors="surrogateescape")).hexdigest()
    return "_".join(folder.name for folder in folders)[:60] + f"_{digest[:6]}"


def read_run(folder: Path, number: int) -> Job:
    """A run, of a sweep or not, by what its files say; what is damaged is left out."""
    job = jobs.load(folder)
    if job is not None:
        job = jobs.read_one(folder)
        return replace(job, number=number, fingerprint=job.fingerprint or fingerprint(folder))
    status = "running" if is_owned(folder) else "completed" if (folder / "last_model.pt").is_file() else "interrupted"
    values, rows = jobs.config_of(folder), jobs.rows_of(folder)
    typed = values.get("overrides")
    overrides = [text for text in typed if isinstance(text, str)] if isinstance(typed, list) else []
    config, data = jobs.settings_of(values), fingerprint(folder)
    return Job(folder, number, overrides, config, status=status, rows=rows, fingerprint=data)


def fingerprint(folder: Path) -> str | None:
    """That of the data that a run was trained on, from its newest checkpoint."""
    for checkpoint in sorted((folder / catalogue.CHECKPOINTS).glob("step_*"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            data = read_object(checkpoint / "config.json").get("data")
            found = data.get("fingerprint") if isinstance(data, dict) else None
            if isinstance(found, str):
                return found
    return None


def comparable(run: Job) -> Job:
    """With what is to be a column where it differs, as if it had been typed: the choice of each group, whose own keys
    then need no columns, what a list of runs shows, and the settings that were typed."""
    chosen = {group: run.config[f"{group}.name"] for group in GROUPS if f"{group}.name" in run.config}
    settings = {key: run.config[key] for key in ALWAYS if key in run.config}
    settings |= {key: text for key, text in run.typed.items() if key in run.config}
    return replace(run, overrides=[f"{key}={value}" for key, value in (chosen | settings).items()])


def _jobs_of(sweep: Path) -> list[Path]:
    return [job.folder for job in jobs.read(sweep)]
