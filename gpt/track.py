"""The record of a run: metrics.jsonl and samples.jsonl on disk first, then Weights & Biases as a mirror of them.

Nothing that W&B does, or fails to do, changes or stops a run. Only this file imports wandb. A row's step is its key on
both sides: what W&B lacks of the rows on disk, after a kill or an outage, is sent when the run goes on, and only that.
"""

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt import run_facts
from gpt.progress import Progress
from gpt.rows import RowFile
from gpt.schema import TrainConfig

log = logging.getLogger(__name__)

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"
INIT_TIMEOUT, FINISH_TIMEOUT = 20, 35  # seconds; the defaults are 90 and for ever
START_DELAY = 3  # seconds, or until the first row: importing wandb would only slow a short first evaluation down
HASTY_TIMEOUT = 5  # for the end of an interrupted run
SLOW_UPLOAD = 5  # seconds: an artifact is asked about on the server first, and 19 s are waited for the answer


class Log:
    """Where a run writes its metrics and samples while it is open; made by `start`."""

    def __init__(self, run_dir: Path, log_model: str) -> None:
        self.stop_requested = False  # somebody has pressed "Stop run" in the dashboard
        self.url: str | None = None
        self.sync_command: str | None = None  # uploads what is not in the cloud yet
        self._run_dir, self._log_model = run_dir, log_model
        self._run: Any = None  # the open wandb.Run
        self._begun = threading.Event()  # there is something to send
        self._connected = threading.Event()  # it is open, or there will be none
        self._waiting: list[Callable[[Any], None]] = []  # what is to be done as soon as it is open
        self._lock = threading.Lock()  # of these two
        self._abandoned = False  # nobody waits for that any more
        self._mirrored = True  # until W&B fails
        self._first_step = 0  # W&B has all rows before it
        self._refused = False  # by W&B's server, with an answer after which W&B tries no more
        self._metrics, self._samples = RowFile(run_dir / "metrics.jsonl"), RowFile(run_dir / "samples.jsonl")

    def event(self, row: dict[str, float | int], samples: list[dict[str, str]]) -> None:
        """Appends samples, as {"prompt", "text"}, to samples.jsonl and one JSON object to metrics.jsonl. `row` needs
        the key `step`, larger than that of the row before; NaN becomes the string "NaN". In W&B both are one row."""
        self._samples.append([{"step": row["step"], **sample} for sample in samples])
        self._metrics.append([row])
        self._mirror(lambda run: self._send(run, row, samples))

    def summary(self, values: dict[str, Any]) -> None:
        """Sets the values that W&B's table of runs shows, such as the best val/loss."""
        self._mirror(lambda run: run.summary.update(values))

    def checkpoint(self, path: Path, progress: Progress) -> None:
        """A checkpoint has been published at `path`: uploads it with `wandb.log_model=all`."""
        if self._log_model == "all":
            self.files(f"step-{progress.step}", "checkpoint", sorted(path.iterdir()))

    def finish(self, last_model: Path, progress: Progress) -> None:
        """The run has come to its end: sends its best values, and the weights that `wandb.log_model` asks for."""
        self.summary({"best/val/loss": progress.best, "best/step": progress.best_step})
        best = self._run_dir / "checkpoints" / f"step_{progress.best_step:08d}"
        if self._log_model == "best" and best.is_dir():
            self.files("best-model", "model", sorted(best.iterdir()))
        if self._log_model in ("last", "all"):
            self.files("last-model", "model", [last_model])

    def files(self, name: str, kind: str, paths: list[Path]) -> None:
        """Uploads files as one W&B artifact, which is called `name` followed by the run's id."""
        self._connected.wait()
        if self._run is None or not self._mirrored:
            return
        started = time.monotonic()
        try:
            import wandb

            artifact = wandb.Artifact(f"{name}-{self._run.id}", type=kind)
            for path in paths:
                artifact.add_file(str(path))  # a copy: the file on disk may be replaced or pruned before the upload
            self._run.log_artifact(artifact)
            problem = "" if time.monotonic() - started < SLOW_UPLOAD else "no answer"
        except Exception as error:
            problem = _one_line(error)
        if problem:  # every further one would hold the run up as long
            log.warning(f"W&B does not take weights ({problem}); no more are sent to it, they are in {self._run_dir}")
            self._log_model = "none"

    def _mirror(self, action: Callable[[Any], None]) -> None:
        """Does something with the W&B run, if there is one: now, or as soon as it is open."""
        self._begun.set()
        with self._lock:
            if not self._connected.is_set():
                self._waiting.append(action)
                return
        self._perform(action)

    def _perform(self, action: Callable[[Any], None]) -> None:
        if self._run is None or not self._mirrored:
            return
        try:
            action(self._run)
        except Exception as error:
            log.warning(f"W&B stopped working ({_one_line(error)}); nothing more is sent to it, the run goes on")
            self._mirrored = False

    def _send(self, run: Any, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """One row to W&B, unless it is there already. Samples are a page of HTML: a wandb.Table is an artifact, about
        which the server is asked first. No answer halts training for 19 s, and a wrong one crashes W&B's process."""
        if row["step"] < self._first_step:
            return
        values = dict(row)
        if samples:
            import wandb

            values["samples"] = wandb.Html(run_facts.page(samples), inject=False, data_is_not_path=True)
        run.log(values, step=row["step"], commit=True)

    def _catch_up(self, rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
        """Sends what is on the disk. Then puts the run's earlier offline folders aside: what they have is online or in
        the current one, and a sync of both would count rows twice."""
        by_step: dict[int, list[dict[str, Any]]] = {}
        for sample in samples:
            by_step.setdefault(sample["step"], []).append(sample)
        for row in rows:
            self._perform(lambda run, row=row: self._send(run, row, by_step.get(row["step"], [])))

        def retire(run: Any) -> None:
            current = Path(run.settings.sync_dir)
            for folder in current.parent.glob(f"offline-run-*-{run.id}*"):  # the second one of a second ends in -1
                if folder != current:
                    folder.rename(folder.with_name(f"superseded-{folder.name}"))

        self._perform(retire)

    def _abandon(self) -> None:
        """Waits no longer for a W&B that is still not open: the rows are on the disk, and sent when the run goes on."""
        self._abandoned = True
        self._begun.set()
        end = time.monotonic() + HASTY_TIMEOUT
        while not self._connected.is_set() and time.monotonic() < end:
            _end_service()
            self._connected.wait(0.5)

    def _close(self, exit_code: int, seconds: float) -> None:
        """Ends the record; W&B has `seconds` for what it has not uploaded yet."""
        self._samples.append([])  # there may be room again
        self._metrics.append([])
        self._begun.set()
        end = time.monotonic() + seconds
        if not self._abandoned and not self._connected.wait(seconds):
            log.warning(f"W&B does not answer; the run is recorded in {self._run_dir} only")
            self._abandon()
        self._end(exit_code, max(HASTY_TIMEOUT, end - time.monotonic()))

    def _end(self, exit_code: int, seconds: float) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        problems, finished = [], threading.Event()

        def finish() -> None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                problems.append(_one_line(error))
            finally:
                finished.set()

        threading.Thread(target=finish, daemon=True).start()  # W&B's own timeout is fixed once a run is open
        try:
            finished.wait(seconds)
        finally:  # a signal may come while we wait
            if not finished.is_set():
                _end_service()
                problems.insert(0, "no answer")
            if self._refused:
                problems.append("its server refuses the data")
            if problems and not self._abandoned:
                log.warning(f"W&B has not received all of the run ({problems[0]}); to upload: {self.sync_command}")


@contextlib.contextmanager
def start(cfg: TrainConfig, run_dir: Path, reported: int) -> Iterator[Log]:
    """Opens the record of a run whose rows up to step `reported` are there (-1: a new run), and closes it whatever
    happens. The run goes on while W&B is connected to: that takes a second, or half a minute with no network.

    Rows of a larger step, which the run is about to write again, are dropped from the disk first. An exception in the
    body marks the run in W&B as failed. W&B keeps the files of all runs in one folder, $WANDB_DIR or else outputs/.
    """
    record = Log(run_dir, cfg.wandb.log_model)
    rows, samples = record._metrics.drop_after(reported), record._samples.drop_after(reported)
    root = Path(os.environ.get("WANDB_DIR") or OUTPUTS)
    wanted = _wanted(cfg.wandb.mode)
    os.environ.setdefault("WANDB_DATA_DIR", str(root / "wandb-data"))  # or artifacts pile up in the home directory
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports to W&B, for which an exit waits up to 10 s
    token = os.environ.pop("SLURM_JWT", None)  # W&B's process records all variables that begin with SLURM_

    def connect() -> None:
        record._begun.wait(START_DELAY)
        try:
            if wanted != "disabled" and not record._abandoned:
                _connect(record, cfg, run_dir, reported >= 0, root, wanted)
                record._catch_up(rows, samples)
        finally:
            with record._lock:
                for action in record._waiting:
                    record._perform(action)
                record._connected.set()

    exit_code, seconds = 1, FINISH_TIMEOUT + 5
    try:
        threading.Thread(target=connect, daemon=True).start()
        yield record
        exit_code = 0
    except KeyboardInterrupt as error:
        exit_code, seconds = getattr(error, "code", 130), HASTY_TIMEOUT
        if not record._connected.wait(1):
            record._abandon()
        raise
    finally:
        record._close(exit_code, seconds)  # not `with run:`, which prints the traceback of an exception
        os.environ.update({"SLURM_JWT": token} if token else {})


def _wanted(mode: str) -> str:
    """What `wandb.mode` and WANDB_MODE ask for."""
    from_environment = os.environ.get("WANDB_MODE")
    if from_environment == "":
        del os.environ["WANDB_MODE"]  # wandb calls it an error
    return from_environment if mode == "auto" and from_environment in ("online", "offline", "disabled") else mode


def _connect(record: Log, cfg: TrainConfig, run_dir: Path, resumed: bool, root: Path, wanted: str) -> None:
    """Opens the W&B run: online, or offline when that is wanted or nothing else is possible."""
    try:
        import wandb

        if "wandb.sdk.launch" not in sys.modules:  # then nobody has declared inputs of a W&B Launch job to it
            # A private name: without this, wandb.init imports all of Launch, 0.4 s, to find that there are none.
            wandb.Run._detect_and_apply_job_inputs = lambda run: None
        root.mkdir(parents=True, exist_ok=True)  # wandb leaves a missing directory for /tmp
        wandb.setup(wandb.Settings(silent=True, mode="offline" if wanted == "offline" else "online"))
        mode = wanted if wanted == "offline" else _online_or_offline(wanted)
        arguments = run_facts.of(cfg, run_dir, resumed)
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,  # seconds; what it has not written is lost when its process is ended
            # Without it the dashboard's button raises KeyboardInterrupt, which ends a whole sweep.
            stop_fn=lambda: setattr(record, "stop_requested", True),
            # Left to itself W&B uploads the difference to the last commit and the remote's URL, with a token in it.
            disable_git=True,
            git_commit=run_facts.commit(),
            git_remote_url="",
            disable_code=True,
            save_code=False,
        )

        def init(mode: str) -> Any:
            run_facts.remember(run_dir, arguments["id"], mode)  # first: a run that is killed now goes on under this id
            # Offline the record of a resumed run is complete: what became of the one before is not known here, and
            # its file may be torn, at which `wandb sync` stops. Without `resume` the rows keep their steps in a sync,
            # so that those which the server has are replaced (wandb/wandb#12668) and not added.
            resume = "allow" if mode == "online" else None
            return wandb.init(**arguments, dir=str(root), mode=mode, resume=resume, settings=settings)

        try:
            run = init(mode)
        except Exception as error:
            if mode == "offline" or record._abandoned:
                raise
            log.warning(f"W&B cannot be reached ({_one_line(error)}); this run is recorded offline")
            _end_service()
            mode = "offline"
            run = init(mode)
        record._run = run
        wandb.termsetup(run.settings, _Messages(record))
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric("val/loss", step_metric="step", summary="min,last")  # "min" alone drops the plain value
        record._first_step = run.starting_step  # 0 offline
        option = "--include-online " if mode == "online" else ""
        record.sync_command = f"wandb sync {option}{shlex.quote(run.settings.sync_dir)}"
        record.url = run.url if mode == "online" else None
        run_facts.remember(run_dir, run.id, mode, record.url)
        log.info(f"W&B: {record.url}" if record.url else f"W&B: offline; to upload: {record.sync_command}")
    except Exception as error:
        if not record._abandoned:
            log.warning(f"W&B does not work ({_one_line(error)}); the run is recorded in {run_dir} only")
        record._end(1, HASTY_TIMEOUT)


class _Messages:
    """Receives what W&B would print. One thing is of interest, which it tells in no other way."""

    def __init__(self, record: Log) -> None:
        self._record = record

    def warning(self, message: str) -> None:
        self._record._refused |= "Fatal error while uploading data" in message

    info = error = warning


def _end_service() -> None:
    """Ends W&B's process at once, which else holds up the exit of ours while a server does not answer. What it has
    written to its files stays. The next wandb.init starts another one."""
    import wandb

    with contextlib.suppress(Exception):  # private names: without them teardown waits for up to FINISH_TIMEOUT
        wandb.sdk.wandb_setup.singleton()._connection._proc._process.kill()
    with contextlib.suppress(Exception, SystemExit):  # it exits when its process ended in any other way than by 0
        wandb.teardown()


def _online_or_offline(wanted: str) -> str:
    """Online when there are credentials: WANDB_API_KEY, netrc or wandb's settings. Asks nobody and no server."""
    import wandb

    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
        problem = "no credentials, see `wandb login`"
    except wandb.Error as error:  # a malformed key
        problem = _one_line(error)
        wanted = "online"
    if wanted == "online":
        log.warning(f"W&B: {problem}; this run is recorded offline")
    return "offline"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
