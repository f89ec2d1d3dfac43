"""The disk record, and W&B as its mirror: runs are recorded offline and read back with W&B's own reader."""

import functools
import json
import logging
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpt import track
from gpt.schema import SweepConfig, WandbConfig

SECRET = "5ec2e7" * 6 + "abcd"  # 40 characters, like a real key


@dataclass
class Config:
    """The part of gpt.schema.TrainConfig that tracking reads; all other fields are only handed on to W&B."""

    wandb: WandbConfig
    sweep: SweepConfig = field(default_factory=lambda: SweepConfig(name=None))
    overrides: list[str] = field(default_factory=list)
    seed: int = 7


def config(mode: str = "offline", sweep: str | None = None, overrides: tuple[str, ...] = (), **changes: Any) -> Config:
    values = {"project": "test", "entity": None, "group": None, "tags": ["tiny", "sample"], "log_model": "none"}
    return Config(WandbConfig(mode=mode, **(values | changes)), SweepConfig(name=sweep), list(overrides))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An environment without credentials, and W&B's folder in it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb-root"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-root" / "data"))
    return tmp_path / "wandb-root"


@pytest.fixture
def fresh_wandb(root):
    """wandb remembers credentials and settings for the whole process."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def recorded(root: Path, run_id: str | None = None) -> list[Path]:
    """W&B's folders of offline runs, oldest first."""
    return sorted((root / "wandb").glob(f"offline-run-*-{run_id or ''}*"), key=lambda path: path.stat().st_mtime_ns)


@functools.cache  # a second each
def inspect(folder: Path, *options: str) -> str:
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", *options, folder]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def summary(folder: Path) -> dict[str, Any]:
    return json.loads(inspect(folder, "--summary"))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r[kind] for r in map(json.loads, inspect(folder).splitlines()) if r["type"] == kind]


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that W&B has, without the columns that it adds."""
    items = [record["item"] for record in records(folder, "history")]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def strict_json(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_one_json_object_for_each_call_and_wandb_has_the_same_rows(root, run_dir):
    rows = [
        {"step": 0, "tokens": 0, "val/loss": 10.5, "val/bpb": 3.9},
        {"step": 10, "tokens": 20480, "train/loss": 9.1, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_second": 2345.6},
        {"step": 20, "tokens": 40960, "train/loss": 8.1, "val/loss": 7.25, "val/bpb": 2.7},
        {"step": 30, "tokens": 61440, "val/loss": 8.0},
        {"step": 31, "tokens": 63488, "train/loss": math.nan, "grad_norm": math.inf, "lr": -math.inf},
    ]
    with track.start(config(), run_dir, step=0) as log:
        for row in rows:
            log.metrics(row)
        log.summary({"best/val/loss": 7.25})
        folder = recorded(root)[0]
        assert log.sync_command == f"wandb sync {folder}"
        assert log.url is None
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    written = [strict_json(line) for line in lines]
    assert written[:-1] == rows[:-1]
    assert history(folder) == written  # W&B has the same strings for NaN and infinity
    run = summary(folder)
    assert (run["state"], run["exit_code"], run["name"], run["tags"]) == ("finished", 0, "run", ["tiny", "sample"])
    assert run["config"]["seed"] == 7
    assert run["config"]["out_dir"] == str(run_dir)
    assert run["summary"]["val/loss"] == {"min": 7.25, "last": 8.0}
    assert run["summary"]["best/val/loss"] == 7.25
    axes = {m.get("name") or m.get("glob_name"): m.get("step_metric") for m in records(folder, "metric")}
    assert axes == {"step": None, "*": "step", "val/loss": "step"}
    assert records(folder, "artifact") == []  # nothing is uploaded unless asked


def test_numbers_that_json_lacks_become_strings_and_are_read_back_as_numbers(run_dir):
    with track.start(config("disabled"), run_dir, step=0) as log:
        log.metrics({"step": 1, "train/loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert strict_json(line) == {"step": 1, "train/loss": "NaN", "grad_norm": "Infinity", "lr": "-Infinity"}
    (row,) = track.read_rows(run_dir / "metrics.jsonl")
    assert math.isnan(row["train/loss"]) and (row["grad_norm"], row["lr"]) == (math.inf, -math.inf)


def test_samples_keep_every_character_and_the_table_in_wandb_grows(root, run_dir):
    wild = "\x1b[31mred\u202e\r\n\x00 é \U0001f600"
    with track.start(config(), run_dir, step=0) as log:
        log.samples(0, [{"prompt": "p", "text": wild}])
        log.samples(100, [{"prompt": "p", "text": "NaN"}, {"prompt": "q", "text": "b"}])
    assert track.read_rows(run_dir / "samples.jsonl") == [
        {"step": 0, "prompt": "p", "text": wild},
        {"step": 100, "prompt": "p", "text": "NaN"},
        {"step": 100, "prompt": "q", "text": "b"},
    ]
    assert (run_dir / "samples.jsonl").read_text().isascii()  # safe to look at with cat
    (folder,) = recorded(root)
    tables = [json.loads(path.read_text())["data"] for path in folder.glob("files/media/table/*.json")]
    rows = sorted(row for table in tables for row in table)
    assert rows == sorted([[0, "p", wild], [100, "p", "NaN"], [100, "q", "b"]])


def test_two_runs_in_one_process_stay_two(root, tmp_path):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        overrides = (f"optimizer.lr={number}", "model.context_length=128")
        with track.start(config(sweep="lr_sweep", overrides=overrides), tmp_path / str(number), step=0) as log:
            log.metrics({"step": number, "train/loss": 1.0})
    folders = recorded(root)
    assert len(folders) == 2
    for number, folder in enumerate(folders):
        assert [row["step"] for row in history(folder)] == [number]
        (run,) = records(folder, "run")
        assert run["display_name"] == f"optimizer.lr={number} model.context_length=128"
        assert (run["run_group"], run["job_type"]) == ("lr_sweep", "train")


def test_an_exception_finishes_the_run_as_failed_and_prints_nothing(root, run_dir, capfd):
    with pytest.raises(RuntimeError, match="bug"), track.start(config(), run_dir, step=0) as log:
        log.metrics({"step": 1, "train/loss": 1.0})
        raise RuntimeError("bug")
    assert records(recorded(root)[0], "exit")[0]["exit_code"] == 1
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_goes_on_under_its_id_and_has_no_step_twice(root, run_dir):
    for first, last, done in ((1, 5, 0), (4, 6, 3)):  # killed after step 5, goes on from a checkpoint of step 3
        with track.start(config(), run_dir, step=done) as log:
            for step in range(first, last + 1):
                log.metrics({"step": step, "train/loss": float(step)})
                log.samples(step, [{"prompt": "p", "text": str(step)}])
    assert [row["step"] for row in track.read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["text"] for row in track.read_rows(run_dir / "samples.jsonl")] == ["1", "2", "3", "4", "5", "6"]
    about = json.loads((run_dir / "wandb.json").read_text())
    assert about["mode"] == "offline" and about["url"] is None
    assert len(recorded(root, about["id"])) == len(recorded(root)) == 2
    assert not list(run_dir.glob("*.tmp"))


def test_a_new_run_in_a_used_directory_starts_an_empty_record(root, run_dir):
    ids = []
    for _ in range(2):
        with track.start(config(), run_dir, step=0) as log:
            log.metrics({"step": 0, "val/loss": 1.0})
        ids.append(json.loads((run_dir / "wandb.json").read_text())["id"])
    assert len(track.read_rows(run_dir / "metrics.jsonl")) == 1
    assert ids[0] != ids[1]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_reported(run_dir, caplog):
    path = run_dir / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    assert track.read_rows(path) == [{"step": 1}, {"step": 2}]
    assert not caplog.records
    path.write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n')
    with caplog.at_level(logging.WARNING):
        assert track.read_rows(path) == [{"step": 1}, {"step": 3}]
    assert "metrics.jsonl:2" in caplog.text
    assert track.read_rows(run_dir / "none.jsonl") == []


def test_disabled_writes_the_disk_record_only(root, run_dir):
    with track.start(config("disabled"), run_dir, step=0) as log:
        log.metrics({"step": 1})
        log.samples(1, [{"prompt": "p", "text": "t"}])
        log.summary({"a": 1})
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
    assert not root.exists()


def test_auto_without_credentials_is_offline_and_says_how_to_upload(root, fresh_wandb, run_dir, caplog, capfd):
    with caplog.at_level(logging.INFO), track.start(config("auto"), run_dir, step=0) as log:
        pass
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("gpt")]
    assert ours == [f"W&B: offline; to upload: {log.sync_command}"]
    assert str(recorded(root)[0]) in log.sync_command
    assert capfd.readouterr() == ("", "")


def test_online_without_credentials_warns_and_asks_nobody(root, fresh_wandb, run_dir, caplog):
    with track.start(config("online"), run_dir, step=0) as log:
        log.metrics({"step": 1})
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "W&B: no credentials, see `wandb login`; this run is recorded offline"
    ]
    assert len(recorded(root)) == 1


@pytest.mark.parametrize("value", ["", "disabled", "nonsense"])
def test_the_environment_may_set_the_mode_when_the_configuration_does_not(
    root, fresh_wandb, run_dir, monkeypatch, value
):
    monkeypatch.setenv("WANDB_MODE", value)
    with track.start(config("auto"), run_dir, step=0) as log:
        log.metrics({"step": 1})
    assert len(track.read_rows(run_dir / "metrics.jsonl")) == 1
    assert len(recorded(root)) == (value == "")


def test_credentials_are_found_in_the_environment_and_in_netrc(root, fresh_wandb, tmp_path, monkeypatch):
    import wandb

    def found() -> str:
        wandb.teardown()
        wandb.setup(wandb.Settings(silent=True))
        return track._online_or_offline("auto")

    assert found() == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert found() == "online"
    monkeypatch.delenv("NETRC")
    assert found() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert found() == "online"


def test_no_secret_reaches_a_file_or_the_terminal(root, fresh_wandb, run_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with track.start(config("offline"), run_dir, step=0) as log:
        log.metrics({"step": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())


def test_wandb_failing_during_a_run_is_one_warning_and_the_run_goes_on(root, run_dir, caplog):
    with track.start(config(), run_dir, step=0) as log:
        log.metrics({"step": 1})
        log.files("weights", "model", [run_dir / "missing.pt"])  # wandb raises ValueError
        log.metrics({"step": 2})
        log.samples(2, [{"prompt": "p", "text": "t"}])
    assert [r.levelno for r in caplog.records if r.levelno >= logging.WARNING] == [logging.WARNING]
    assert [row["step"] for row in track.read_rows(run_dir / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_is_one_warning_and_the_run_goes_on(root, run_dir, caplog):
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    log = track.Log(run_dir, "none")
    for step in (1, 2, 3):
        log.metrics({"step": step})
    log.samples(3, [{"prompt": "p", "text": "t"}])
    (record,) = caplog.records
    assert "metrics.jsonl cannot be written (No space left on device); training continues" in record.getMessage()
    assert len(track.read_rows(run_dir / "samples.jsonl")) == 1


def test_a_row_is_written_whole_or_not_at_all(run_dir):
    log = track.Log(run_dir, "none")
    log.metrics({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # bytes: the disk is full in the middle of a row
    try:
        log.metrics({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.metrics({"step": 3})
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


@dataclass
class Progress:
    step: int
    best: float
    best_step: int


@pytest.mark.parametrize(
    ("log_model", "uploaded"),
    [
        ("best", [("best-model", ["a", "b"])]),
        ("all", [("step-2", ["a", "b"]), ("step-4", ["a", "b"]), ("last-model", ["last_model.pt"])]),
    ],
)
def test_weights_are_uploaded_only_when_asked(root, run_dir, log_model, uploaded):
    (run_dir / "last_model.pt").write_bytes(b"weights")
    with track.start(config(log_model=log_model), run_dir, step=0) as log:
        for step in (2, 4):
            folder = run_dir / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / "a").write_bytes(b"a%d" % step)
            (folder / "b").write_bytes(b"b%d" % step)
            log.checkpoint(folder, Progress(step, 1.5, 2))
        log.finish(run_dir / "last_model.pt", Progress(4, 1.5, 2))
        run_id = json.loads((run_dir / "wandb.json").read_text())["id"]
    (folder,) = recorded(root)
    artifacts = [(a["name"], [c["path"] for c in a["manifest"]["contents"]]) for a in records(folder, "artifact")]
    assert artifacts == [(f"{name}-{run_id}", files) for name, files in uploaded]


@pytest.mark.exhaustive  # 25 s: W&B tries for as long as it may
def test_an_unreachable_server_costs_half_a_minute_a_warning_and_nothing_else(
    root, fresh_wandb, run_dir, caplog, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), track.start(config("auto"), run_dir, step=0) as log:
        assert time.monotonic() - started < 35
        log.metrics({"step": 1})
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("gpt")]
    assert warning.startswith("W&B cannot be reached") and warning.endswith("this run is recorded offline")
    assert log.sync_command == f"wandb sync {recorded(root)[0]}"
    assert history(recorded(root)[0]) == track.read_rows(run_dir / "metrics.jsonl") == [{"step": 1}]
    assert not [path for path in run_dir.parent.rglob("*") if path.is_file() and SECRET in path.read_text("latin-1")]
