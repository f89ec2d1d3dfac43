"""The record of a run: metrics.jsonl and samples.jsonl on disk first, then Weights & Biases as a mirror of them.

Nothing that W&B does, or fails to do, changes or stops a run. Only this file imports wandb.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.schema import TrainConfig, as_dict

if TYPE_CHECKING:  # gpt.loop imports torch
    from gpt.loop import Progress

log = logging.getLogger(__name__)

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"
INIT_TIMEOUT, FINISH_TIMEOUT = 20, 50  # seconds; the defaults are 90 and for ever
# JSON has no such numbers. W&B writes them as the same strings.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Log:
    """Where a run writes its metrics and samples while it is open; made by `start`."""

    def __init__(self, run_dir: Path, log_model: str) -> None:
        self.stop_requested = False  # somebody has pressed "Stop run" in the dashboard
        self.url: str | None = None
        self.sync_command: str | None = None  # uploads what is not in the cloud yet
        self._run_dir, self._log_model = run_dir, log_model
        self._run: Any = None  # the open wandb.Run
        self._mirrored = True  # until W&B fails
        self._table: Any = None  # the W&B table of samples
        self._broken: set[Path] = set()  # files that could not be written

    def metrics(self, row: dict[str, float | int]) -> None:
        """Appends one JSON object to metrics.jsonl. `row` needs the key `step`; NaN becomes the string "NaN"."""
        self._append("metrics.jsonl", [row])
        self._mirror(lambda run: run.log(dict(row)))

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Appends texts, as {"prompt", "text"}, to samples.jsonl and to the growing table `samples` in W&B."""
        self._append("samples.jsonl", [{"step": step, **sample} for sample in samples])
        self._mirror(lambda run: self._log_table(run, step, samples))

    def summary(self, values: dict[str, Any]) -> None:
        """Sets the values that W&B's table of runs shows, such as the best val/loss."""
        self._mirror(lambda run: run.summary.update(values))

    def checkpoint(self, path: Path, progress: "Progress") -> None:
        """A checkpoint has been published at `path`: uploads it with `wandb.log_model=all`."""
        if self._log_model == "all":
            self.files(f"step-{progress.step}", "checkpoint", sorted(path.iterdir()))

    def finish(self, last_model: Path, progress: "Progress") -> None:
        """The run has come to its end: sends its best values, and the weights that `wandb.log_model` asks for."""
        self.summary({"best/val/loss": progress.best, "best/step": progress.best_step})
        best = self._run_dir / "checkpoints" / f"step_{progress.best_step:08d}"
        if self._log_model == "best" and best.is_dir():
            self.files("best-model", "model", sorted(best.iterdir()))
        if self._log_model in ("last", "all"):
            self.files("last-model", "model", [last_model])

    def files(self, name: str, kind: str, paths: list[Path]) -> None:
        """Uploads files as one W&B artifact, which is called `name` followed by the run's id."""

        def upload(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{name}-{run.id}", type=kind)
            for path in paths:
                artifact.add_file(str(path))  # a copy: the file on disk may be replaced or pruned before the upload
            run.log_artifact(artifact)

        self._mirror(upload)

    def _log_table(self, run: Any, step: int, samples: list[dict[str, str]]) -> None:
        import wandb

        if self._table is None:  # INCREMENTAL: the default mode keeps the first rows only
            self._table = wandb.Table(columns=["step", "prompt", "text"], log_mode="INCREMENTAL")
        for sample in samples:
            self._table.add_data(step, sample["prompt"], sample["text"])
        run.log({"step": step, "samples": self._table})

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        path = self._run_dir / name
        try:
            _append_whole(path, "".join(f"{json.dumps(_finite(row), allow_nan=False)}\n" for row in rows))
        except OSError as error:
            if path not in self._broken:
                log.warning(f"{path} cannot be written ({error.strerror}); training continues")
            self._broken.add(path)

    def _mirror(self, action: Callable[[Any], None]) -> None:
        if self._run is None or not self._mirrored:
            return
        try:
            action(self._run)
        except Exception as error:
            log.warning(f"W&B stopped working ({_one_line(error)}); nothing more is sent to it, the run goes on")
            self._mirrored = False

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning(f"W&B has not received all of the run ({_one_line(error)}); to upload: {self.sync_command}")


@contextlib.contextmanager
def start(cfg: TrainConfig, run_dir: Path, step: int) -> Iterator[Log]:
    """Opens the record of a run that goes on after `step` (0: a new run), and closes it whatever happens.

    Rows of a larger step, which the run is about to write again, are dropped from the disk first. An exception in the
    body marks the run in W&B as failed. W&B keeps the files of all runs in one folder, $WANDB_DIR or else outputs/.
    """
    for name in ("metrics.jsonl", "samples.jsonl"):
        _drop_rows(run_dir / name, step)
    record = Log(run_dir, cfg.wandb.log_model)
    root = Path(os.environ.get("WANDB_DIR") or OUTPUTS)
    exit_code = 1
    try:
        _connect(record, cfg, run_dir, step > 0, root)
        yield record
        exit_code = 0
    finally:
        record._finish(exit_code)  # not `with run:`, which prints the traceback of an exception


def _connect(record: Log, cfg: TrainConfig, run_dir: Path, resumed: bool, root: Path) -> None:
    """Opens the W&B run: online, offline when that is not possible, or not at all."""
    wanted, from_environment = cfg.wandb.mode, os.environ.get("WANDB_MODE")
    if from_environment == "":
        del os.environ["WANDB_MODE"]  # wandb calls it an error
    if wanted == "auto" and from_environment in ("online", "offline", "disabled"):
        wanted = from_environment
    if wanted == "disabled":
        return
    os.environ.setdefault("WANDB_DATA_DIR", str(root / "wandb-data"))  # or artifacts pile up in the home directory
    try:
        import wandb

        root.mkdir(parents=True, exist_ok=True)  # wandb leaves a missing directory for /tmp
        wandb.setup(wandb.Settings(silent=True, mode="offline" if wanted == "offline" else "online"))
        mode = wanted if wanted == "offline" else _online_or_offline(wanted)
        arguments = _arguments(cfg, run_dir, resumed)
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            # Without it the dashboard's button raises KeyboardInterrupt, which ends a whole sweep.
            stop_fn=lambda: setattr(record, "stop_requested", True),
        )
        try:
            run = wandb.init(**arguments, dir=str(root), mode=mode, settings=settings)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning(f"W&B cannot be reached ({_one_line(error)}); this run is recorded offline")
            wandb.teardown()
            mode = "offline"
            run = wandb.init(**arguments, dir=str(root), mode=mode, settings=settings)
        record._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric("val/loss", step_metric="step", summary="min,last")  # "min" alone drops the plain value
        record.sync_command = f"wandb sync {shlex.quote(run.settings.sync_dir)}"
        record.url = run.url if mode == "online" else None
        state = {"id": run.id, "url": record.url, "mode": mode}
        (run_dir / "wandb.json").write_text(json.dumps(state, indent=2) + "\n")
        log.info(f"W&B: {record.url}" if record.url else f"W&B: offline; to upload: {record.sync_command}")
    except Exception as error:
        log.warning(f"W&B does not work ({_one_line(error)}); the run is recorded in {run_dir} only")
        record._finish(exit_code=1)


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


def _arguments(cfg: TrainConfig, run_dir: Path, resumed: bool) -> dict[str, Any]:
    """What wandb.init is told about the run. A resumed run goes on under its old id."""
    overrides = " ".join(o for o in cfg.overrides if not o.startswith(("wandb.", "sweep.")))
    run_id = secrets.token_hex(4)
    if resumed:
        with contextlib.suppress(OSError, ValueError, KeyError):
            run_id = json.loads((run_dir / "wandb.json").read_text())["id"]
    return {
        "project": cfg.wandb.project,
        "entity": cfg.wandb.entity,
        "group": cfg.wandb.group or cfg.sweep.name,
        "job_type": "train",
        "name": (overrides if cfg.sweep.name and overrides else run_dir.name)[:128],  # as long as W&B allows
        "tags": list(cfg.wandb.tags),
        "config": as_dict(cfg) | {"out_dir": str(run_dir)},
        "id": run_id,
        "resume": "allow",
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when there is no file. A torn last line, of a killed run, is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({k: v if k in ("prompt", "text") else _number(v) for k, v in row.items()})
        except (ValueError, AttributeError):
            if number < len(lines):
                log.warning(f"{path}:{number}: not a JSON object, left out")
    return rows


def _drop_rows(path: Path, step: int) -> None:
    """Leaves only the rows up to `step`, none for step 0. The file is replaced whole or not at all."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    try:
        kept = [row for row in read_rows(path) if 0 < step >= row.get("step", math.inf)]
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(_finite(row), allow_nan=False)}\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        log.warning(f"{path} still has rows after step {step} ({error.strerror}); training continues")


def _append_whole(path: Path, text: str) -> None:
    """Appends `text`, or nothing at all when the disk is full. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _as_text(value) if isinstance(value, float) else value for key, value in row.items()}


def _as_text(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
