"""Records a run: metrics.jsonl and samples.jsonl on disk first, then Weights & Biases.

A row's step is its key on both sides: what W&B lacks of the rows on disk, after a kill or an outage, is sent when the
run goes on, and only that. The result of a sweep, which is on the disk as well, becomes a W&B run of its own.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.config.schema import METRIC, TrainConfig, WandbConfig
from gpt.files.jsonl import RowFile
from gpt.machine import threads
from gpt.progress import Progress
from gpt.runs import model_card, wandb_description, wandb_run


class RunLog:
    """Where a run writes its metrics and samples while it is open; made by `start`."""

    def __init__(self, run_dir: Path, log_model: str) -> None:
        self.wandb_run = wandb_run.WandbRun(run_dir, "run")
        self._run_dir, self._log_model = run_dir, log_model
        self._first_step = 0  # W&B has all rows before it
        self._starvation = threads.Starvation()
        self._best: dict[str, Any] | None = None  # the row of the best evaluation
        self._metrics, self._samples = RowFile(run_dir / "metrics.jsonl"), RowFile(run_dir / "samples.jsonl")

    @property
    def stop_requested(self) -> bool:
        """Somebody has pressed "Stop run" in the dashboard."""
        return self.wandb_run.stop_requested

    def event(self, row: dict[str, float | int], samples: list[dict[str, str]]) -> None:
        """Appends samples, as {"prompt", "text"}, to samples.jsonl and one JSON object to metrics.jsonl. `row` needs
        the key `step`, larger than that of the row before; NaN becomes the string "NaN". In W&B both are one row."""
        self._samples.append([{"step": row["step"], **sample} for sample in samples])
        self._metrics.append([row])
        self._starvation.check()
        self.wandb_run.do(lambda run: self._send(run, row, samples))
        if METRIC in row:
            self._best = model_card.best_row([self._best or {}, row])
            self.wandb_run.do(self._summarise)

    def checkpoint(self, path: Path, progress: Progress) -> None:
        """A checkpoint has been published at `path`: uploads it with `wandb.log_model=all`."""
        if self._log_model == "all":
            self.wandb_run.files(f"step-{progress.step}", "checkpoint", sorted(path.iterdir()))

    def finish(self, last_model: Path, progress: Progress) -> None:
        """The run has come to its end: sends the weights that `wandb.log_model` asks for."""
        best = self._run_dir / "checkpoints" / f"step_{progress.best_step:08d}"
        if self._log_model == "best" and best.is_dir():
            self.wandb_run.files("best-model", "model", sorted(best.iterdir()))
        if self._log_model in ("last", "all"):
            self.wandb_run.files("last-model", "model", [last_model])

    def _send(self, run: Any, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """One row to W&B, unless it is there already."""
        if row["step"] < self._first_step:
            return
        values = dict(row)
        if samples:
            values["samples"] = wandb_run.page(wandb_description.page(samples))
        run.log(values, step=row["step"], commit=True)

    def _summarise(self, run: Any) -> None:
        """Sets what W&B's table of runs shows, whether the run comes to its end or not: its best evaluation so far."""
        if self._best:
            run.summary.update({f"best/{METRIC}": self._best[METRIC], "best/step": self._best["step"]})

    def _catch_up(self, run: Any, rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
        """Says what the columns mean, and sends what is on the disk and not in W&B."""
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric(METRIC, step_metric="step", summary="min,last")  # "min" alone drops the plain value
        self._first_step = run.starting_step  # 0 offline
        by_step: dict[int, list[dict[str, Any]]] = {}
        for sample in samples:
            by_step.setdefault(sample["step"], []).append(sample)
        for row in rows:
            self._send(run, row, by_step.get(row["step"], []))
        self._summarise(run)  # what W&B has may be of an evaluation that the run has gone back behind


class NoLog:
    """What a rank has that records nothing: the first one does."""

    stop_requested = False

    def event(self, row: dict[str, float | int], samples: list[dict[str, str]]) -> None:
        """See RunLog, as for the other two."""

    def checkpoint(self, path: Path, progress: Progress) -> None: ...

    def finish(self, last_model: Path, progress: Progress) -> None: ...


@contextlib.contextmanager
def start(cfg: TrainConfig, run_dir: Path, reported: int, is_first: bool = True) -> Iterator[RunLog | NoLog]:
    """Opens the record of a run whose rows up to step `reported` are there (-1: a new run), and closes it whatever
    happens. Rows of a larger step, which the run is about to write again, are dropped from the disk first. Of several
    ranks only the first has a record."""
    if not is_first:
        yield NoLog()
        return
    record = RunLog(run_dir, cfg.wandb.log_model)
    rows, samples = record._metrics.drop_after(reported), record._samples.drop_after(reported)
    record._best = model_card.best_row(rows)
    about = wandb_description.describe_run(cfg, run_dir, reported >= 0)
    with record.wandb_run.opened(about, cfg.wandb.mode, lambda run: record._catch_up(run, rows, samples)):
        try:
            yield record
        finally:
            for file in (record._samples, record._metrics):
                file.append([])  # there may be room again


def send_rest(cfg: TrainConfig, run_dir: Path, last_model: Path, progress: Progress) -> bool:
    """Sends what W&B lacks of a run that has come to its end, once W&B can be reached: rows and weights. Returns False
    for one that was killed at its very end: it has its last model still to write."""
    if not last_model.exists():
        return False
    if wandb_description.is_incomplete(run_dir) and wandb_run.is_online(cfg.wandb.mode):
        with start(cfg, run_dir, progress.reported) as log:
            log.finish(last_model, progress)
    return True


def sweep_summary(
    directory: Path,
    name: str,
    cfg: WandbConfig,
    columns: list[str],
    rows: list[list[Any]],
    configs: list[dict[str, Any]],
    statuses: list[str],
    best: dict[str, Any],
) -> None:
    """Makes the W&B run of a whole sweep, or replaces what it says: the leaderboard as a table, the sweep's figures,
    and in its summary the best result and the number of jobs by status.

    `configs` ({"optimizer.lr": 0.001, ...}) and `statuses` have one item for each job, `best` is what shall be found
    in the summary, such as {"val/loss": 3.2, "settings": {"optimizer.lr": 0.001}}. wandb.json in `directory` keeps the
    run's id. Returns when W&B has it all, within a minute in any case; never raises.
    """
    record = wandb_run.WandbRun(directory, "sweep")
    about = wandb_description.describe_sweep(cfg, directory, name, configs)

    def send(run: Any) -> None:
        run.summary.update(wandb_description.sweep_summary(statuses, best))
        figures = [directory / name for name in ("curves.png", "heatmap.png")]
        run.log({path.stem: wandb_run.image(path) for path in figures if path.is_file()}, commit=False)
        run.log({"leaderboard": wandb_run.table(*wandb_description.cells([columns]), wandb_description.cells(rows))})

    with record.opened(about, cfg.mode, send):
        pass


def evaluation(
    directory: Path,
    name: str,
    cfg: WandbConfig,
    config: dict[str, Any],
    rows: list[dict[str, float | int]],
    tables: dict[str, tuple[list[str], list[list[Any]]]],
) -> None:
    """Makes the W&B run of the evaluations of a model, or replaces what it says: a row of figures for each step, the
    last one as its summary, and tables by name, (columns, rows) each. As in `sweep_summary`, `directory` keeps its id,
    and nothing is raised."""
    record = wandb_run.WandbRun(directory, "evaluation")
    about = wandb_description.describe_evaluation(cfg, directory, name, config)

    def send(run: Any) -> None:
        run.define_metric("*", step_metric="step")
        for row in rows:
            run.log({key: wandb_description.cells([[value]])[0][0] for key, value in row.items()})
        for title, (columns, lines) in tables.items():
            run.log({title: wandb_run.table(*wandb_description.cells([columns]), wandb_description.cells(lines))})

    with record.opened(about, cfg.mode, send):
        pass
