"""The disk record, and W&B as its mirror: runs are recorded offline and read back with W&B's own reader."""

import functools
import html
import json
import logging
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from wandb_server import Child, Server, children, command, wait_for

from gpt.config import launch
from gpt.config.schema import SweepConfig, WandbConfig
from gpt.errors import ENVIRONMENT, NUMERICAL, Interrupted, UserError, exit_code
from gpt.files.jsonl import RowFile, read_rows
from gpt.runs import run_log, wandb_run

BEST = ("best/val/loss", "best/step")


@dataclass
class Config:
    """The part of gpt.schema.TrainConfig that tracking reads; all other fields are only handed on to W&B."""

    wandb: WandbConfig
    sweep: SweepConfig
    overrides: list[str] = field(default_factory=list)
    seed: int = 7


def config(mode: str = "offline", sweep: str | None = None, overrides: tuple[str, ...] = (), **changes: Any) -> Config:
    values = {"project": "test", "entity": None, "group": None, "tags": ["tiny", "sample"], "log_model": "none"}
    sweep = SweepConfig(name=sweep, rungs=[], keep=0.5, pause_at=None)
    return Config(WandbConfig(mode=mode, **(values | changes)), sweep, list(overrides))


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


def recorded(root: Path, run_id: str = "") -> list[Path]:
    """W&B's folders of offline runs, oldest first."""
    files = (root / "wandb").glob(f"offline-run-*-{run_id}*/*.wandb")
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]


@functools.cache
def inspect(folder: Path, options: str = "") -> str:
    return command(f"wandb leet inspect --json {options} {folder}")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads(inspect(folder, "--summary"))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r[kind] for r in map(json.loads, inspect(folder).splitlines()) if r["type"] == kind]


def best_of(folder: Path) -> dict[str, Any]:
    """What the summary ends with; `wandb leet inspect --summary` now and then leaves keys out that the file has."""
    updates = [record["update"] for record in records(folder, "summary")]
    return {key: [update[key] for update in updates if key in update][-1] for key in BEST}


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that W&B has, without the columns that it adds."""
    items = [record["item"] for record in records(folder, "history")]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def test_wandb_has_the_same_rows_as_the_disk(root, run_dir):
    rows = [
        {"step": 0, "tokens": 0, "val/loss": 10.5, "val/bpb": 3.9},
        {"step": 10, "tokens": 20480, "train/loss": 9.1, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_second": 2345.6},
        {"step": 20, "tokens": 40960, "train/loss": 8.1, "val/loss": 7.25, "val/bpb": 2.7},
        {"step": 30, "tokens": 61440, "val/loss": 8.0},
        {"step": 31, "tokens": 63488, "train/loss": math.nan, "grad_norm": math.inf, "lr": -math.inf},
    ]
    with run_log.start(config(), run_dir, reported=-1) as log:
        for row in rows:
            log.event(row, [])
    folder = recorded(root)[0]
    assert log.wandb_run.sync_command == f"wandb sync {folder}"
    assert log.wandb_run.url is None
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert history(folder) == [json.loads(line) for line in lines]  # W&B has the same strings for NaN and infinity
    assert [record["step"]["num"] for record in records(folder, "history")] == [row["step"] for row in rows]
    run = summary(folder)
    assert (run["state"], run["exit_code"], run["name"], run["tags"]) == ("finished", 0, "run", ["tiny", "sample"])
    assert run["config"]["seed"] == 7
    assert run["config"]["out_dir"] == str(run_dir)
    assert run["summary"]["val/loss"] == {"min": 7.25, "last": 8.0}
    assert best_of(folder) == {"best/val/loss": 7.25, "best/step": 20}
    axes = {m.get("name") or m.get("glob_name"): m.get("step_metric") for m in records(folder, "metric")}
    assert axes == {"step": None, "*": "step", "val/loss": "step"}
    assert records(folder, "artifact") == []  # nothing is uploaded unless asked


def test_samples_keep_every_character_and_are_part_of_their_row_in_wandb(root, run_dir):
    wild = "\x1b[31mred\u202e\r\n\x00 é \U0001f600 <script>alert(1)</script>\ud800"
    with run_log.start(config(), run_dir, reported=-1) as log:
        log.event({"step": 0, "val/loss": 2.0}, [{"prompt": "p", "text": wild}])
        log.event({"step": 100, "val/loss": 1.0}, [{"prompt": "p", "text": "NaN"}, {"prompt": "q", "text": "b"}])
    assert read_rows(run_dir / "samples.jsonl") == [
        {"step": 0, "prompt": "p", "text": wild},
        {"step": 100, "prompt": "p", "text": "NaN"},
        {"step": 100, "prompt": "q", "text": "b"},
    ]
    assert (run_dir / "samples.jsonl").read_text().isascii()  # safe to look at with cat
    (folder,) = recorded(root)
    first, second = history(folder)
    assert [(row["step"], row["val/loss"]) for row in (first, second)] == [(0, 2.0), (100, 1.0)]
    pages = [(folder / "files" / row["samples.path"]).read_text() for row in (first, second)]
    shown = "\\x1b[31mred\\u202e\\r\n\\x00 é \U0001f600 <script>alert(1)</script>\\ud800"
    assert pages[0] == f"<h4>p</h4>\n<pre>{html.escape(shown)}</pre>\n"
    assert pages[1] == "<h4>p</h4>\n<pre>NaN</pre>\n<h4>q</h4>\n<pre>b</pre>\n"
    assert records(folder, "artifact") == []


def test_two_runs_in_one_process_stay_two(root, tmp_path):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        overrides = (f"optimizer.lr={number}", "model.context_length=128")
        with run_log.start(config(sweep="lr_sweep", overrides=overrides), tmp_path / str(number), reported=-1) as log:
            log.event({"step": number, "train/loss": 1.0}, [])
    folders = recorded(root)
    assert len(folders) == 2
    for number, folder in enumerate(folders):
        assert [row["step"] for row in history(folder)] == [number]
        (run,) = records(folder, "run")
        assert run["display_name"] == f"optimizer.lr={number} model.context_length=128"
        assert (run["run_group"], run["job_type"]) == ("lr_sweep", "train")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("bug"), 1),
        (UserError("not finite", code=NUMERICAL), 4),
        (UserError("disk full", code=ENVIRONMENT), 5),
        (OSError(28, "disk full", "loss.png"), 5),
        (Interrupted(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_run_that_fails_tells_wandb_the_exit_code_of_its_process_and_its_best_loss(root, run_dir, capfd, error, code):
    with pytest.raises(BaseException) as caught, run_log.start(config(), run_dir, reported=-1) as log:
        for step, loss in enumerate((1.0, 3.0, 2.0, 2.5)):  # step 0 is of the first weights
            log.event({"step": step, "val/loss": loss}, [])
        raise error
    (folder,) = recorded(root)
    assert records(folder, "exit")[0]["exit_code"] == code == exit_code(caught.value) == launch.explain(caught.value)[0]
    assert best_of(folder) == {"best/val/loss": 2.0, "best/step": 2}
    assert capfd.readouterr() == ("", "")
    with run_log.start(config(), run_dir, reported=1) as log:  # gone back behind the best
        log.event({"step": 2, "val/loss": 3.5}, [])
    folder = recorded(root)[-1]
    assert best_of(folder) == {"best/val/loss": 3.0, "best/step": 1}


RUN = """
import time
from pathlib import Path
from test_run_log import config
from gpt.runs import run_log
from gpt.terminal import console

console.setup()
directory, reported, last, killed = Path(arguments[0]), *map(int, arguments[1:])
with run_log.start(config("auto"), directory, reported) as log:
    for step in range(reported + 1, last + 1):
        log.event({"step": step, "train/loss": 1 / (step + 1)}, [{"prompt": "p", "text": str(step)}] * (step % 4 == 0))
        while log.wandb_run.sync_command is None and killed >= 0:  # not open yet; the last run does not wait
            time.sleep(0.01)
        print(step, flush=True)
        time.sleep(600 if step == killed else 0)
"""
LAST = 30
ALL_ROWS = [{"step": step, "train/loss": 1 / (step + 1)} for step in range(LAST + 1)]
SAMPLE_STEPS = list(range(0, LAST + 1, 4))


@dataclass
class Online:
    """A run that has logged 13 rows to a server and then stands still; W&B sends them after 15 s."""

    server: Server
    environment: dict[str, str]
    run_dir: Path
    child: Child


@pytest.fixture(scope="module", autouse=True)
def online(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    (folder / "run").mkdir()
    with Server() as server:
        environment = {"WANDB_DIR": str(folder / "root"), "HOME": str(folder), **server.environment}
        run = Online(server, environment, folder / "run", start(folder / "run", -1, 12, environment))
        yield run
        if run.child.code is None:  # the test that kills it was not asked for
            run.child.kill()


def start(run_dir: Path, reported: int, killed: int, environment: dict[str, str]) -> Child:
    return children().start(RUN, str(run_dir), str(reported), str(LAST), str(killed), **environment)


def go_on(run_dir: Path, reported: int, kills: tuple[int, ...], environment: dict[str, str]) -> Child:
    """The last child: a run that is killed after the row of each of the steps `kills`, and goes on each time from three
    rows before, as from a checkpoint."""
    for step in kills:
        child = start(run_dir, reported, step, environment)
        kill_after(child, step)
        reported = step - 3
    child = start(run_dir, reported, -1, environment)
    assert child.wait() == 0, child.stderr
    assert read_rows(run_dir / "metrics.jsonl") == ALL_ROWS
    samples = read_rows(run_dir / "samples.jsonl")
    assert samples == [{"step": step, "prompt": "p", "text": str(step)} for step in SAMPLE_STEPS]
    return child


def kill_after(child: Child, step: int) -> None:
    child.wait_for(str(step))
    child.kill()
    wait_for(lambda: is_alone(child.pid), "W&B's process outlives the one that it belongs to", seconds=5)


def is_alone(pid: int) -> bool:
    """Whether no wandb-core is running that was started for process `pid`."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    return not any(b"wandb-core" in line and b"--pid\0%d\0" % pid in line for line in lines)


def check_uploaded(server: Server) -> None:
    """The server has the rows of the disk, and no line has come twice."""
    (run,) = server.runs.values()
    assert len(run.lines) == len(ALL_ROWS)
    assert [{key: value for key, value in row.items() if key != "samples"} for row in run.rows] == ALL_ROWS
    assert [row["step"] for row in run.rows if "samples" in row] == SAMPLE_STEPS
    assert run.exit_code == 0


def test_a_run_killed_offline_is_complete_in_its_last_folder_and_uploaded_once(root, run_dir, record_property):
    kills = (4, 12, 20)
    offline = {"WANDB_DIR": str(root), "HOME": str(root), "WANDB_MODE": "offline"}
    child = go_on(run_dir, -1, kills, offline)
    (last,) = recorded(root)
    assert f"W&B: offline; to upload: wandb sync {last}" in child.stdout.splitlines()
    earlier = sorted((root / "wandb").glob("superseded-offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(earlier) == len(kills)
    lost = [step + 1 - len(history(folder)) for step, folder in zip(kills, earlier, strict=True)]
    with Server() as server:  # of all that there is: the folders of the killed processes have been put aside
        command(f"wandb sync {root}/wandb", HOME=str(root), **server.environment)
        check_uploaded(server)
    record_property("count", f"W&B offline: {len(kills)} kill -9 cost its files {lost} rows that are on the disk; in "
                    f"the end {len(ALL_ROWS)} uploaded, none twice, none missing")  # fmt: skip


def test_earlier_folders_are_put_aside_also_under_a_name_that_is_taken(tmp_path):
    current, earlier = (tmp_path / f"offline-run-20261129_130000-abc{suffix}" for suffix in ("-1", ""))
    for folder in (current, earlier, tmp_path / f"superseded-{earlier.name}"):
        (folder / "files").mkdir(parents=True)
    open_run = SimpleNamespace(id="abc", settings=SimpleNamespace(sync_dir=str(current)))  # of W&B's run, what is read
    wandb_run._put_earlier_aside(open_run)
    names = {current.name, f"superseded-{earlier.name}", f"superseded-{earlier.name}+"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_new_run_in_a_used_directory_starts_an_empty_record(root, run_dir):
    ids = []
    for _ in range(2):
        with run_log.start(config(), run_dir, reported=-1) as log:
            log.event({"step": 0, "val/loss": 1.0}, [])
        ids.append(json.loads((run_dir / "wandb.json").read_text())["id"])
    assert len(read_rows(run_dir / "metrics.jsonl")) == 1
    assert ids[0] != ids[1]


def test_disabled_writes_the_disk_record_only(root, run_dir):
    with run_log.start(config("disabled"), run_dir, reported=-1) as log:
        log.event({"step": 1}, [{"prompt": "p", "text": "t"}])
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
    assert not root.exists()


def test_auto_without_credentials_is_offline_and_says_how_to_upload(root, fresh_wandb, run_dir, caplog, capfd):
    with caplog.at_level(logging.INFO), run_log.start(config("auto"), run_dir, reported=-1) as log:
        pass
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("gpt")]
    assert ours == [f"W&B: offline; to upload: {log.wandb_run.sync_command}"]
    assert str(recorded(root)[0]) in log.wandb_run.sync_command
    assert capfd.readouterr() == ("", "")


def test_online_without_credentials_warns_and_asks_nobody(root, fresh_wandb, run_dir, caplog):
    with run_log.start(config("online"), run_dir, reported=-1) as log:
        log.event({"step": 1}, [])
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "W&B: no credentials, see `wandb login`; this run is recorded offline"
    ]
    assert len(recorded(root)) == 1


@pytest.mark.parametrize("value", ["", "disabled", "nonsense"])
def test_the_environment_may_set_the_mode_when_the_configuration_does_not(
    root, fresh_wandb, run_dir, monkeypatch, value
):
    monkeypatch.setenv("WANDB_MODE", value)
    with run_log.start(config("auto"), run_dir, reported=-1) as log:
        log.event({"step": 1}, [])
    assert len(read_rows(run_dir / "metrics.jsonl")) == 1
    assert len(recorded(root)) == (value == "")


def test_wandb_failing_during_a_run_is_one_warning_and_the_run_goes_on(root, run_dir, caplog):
    with run_log.start(config(), run_dir, reported=-1) as log:
        log.event({"step": 1}, [])
        log.event({"step": 2, 5: 1.0}, [])  # W&B takes no key that is not a string
        log.event({"step": 3}, [{"prompt": "p", "text": "t"}])
    assert [r.levelno for r in caplog.records if r.levelno >= logging.WARNING] == [logging.WARNING]
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3]


def test_weights_that_wandb_does_not_take_are_one_warning_and_its_rows_go_on(root, run_dir, caplog):
    with run_log.start(config(log_model="all"), run_dir, reported=-1) as log:
        log.event({"step": 1}, [])
        log.wandb_run.files("weights", "model", [run_dir / "missing.pt"])  # wandb raises ValueError
        log.event({"step": 2}, [])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("W&B does not take weights (")
    assert [row["step"] for row in history(recorded(root)[0])] == [1, 2]


@dataclass
class Progress:
    step: int
    best: float
    best_step: int
    reported: int = 0


@pytest.mark.parametrize(
    ("log_model", "uploaded"),
    [
        ("best", [("best-model", ["a", "b"])]),
        ("all", [("step-2", ["a", "b"]), ("step-4", ["a", "b"]), ("last-model", ["last_model.pt"])]),
    ],
)
def test_weights_are_uploaded_only_when_asked(root, run_dir, log_model, uploaded):
    (run_dir / "last_model.pt").write_bytes(b"weights")
    with run_log.start(config(log_model=log_model), run_dir, reported=-1) as log:
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


def test_a_run_killed_online_goes_on_with_no_row_twice_and_none_missing(online, record_property):
    def received() -> int:
        return sum(len(run.lines) for run in online.server.runs.values())

    wait_for(lambda: received() == 13, "the rows do not arrive")
    kill_after(online.child, 12)  # W&B is ahead of step 9, from which the run goes on
    child = start(online.run_dir, 9, 20, online.environment)
    kill_after(child, 20)
    assert received() == 13  # it is behind step 17
    child = go_on(online.run_dir, 17, (), online.environment)
    url = json.loads((online.run_dir / "wandb.json").read_text())["url"]
    assert f"W&B: {url}" in child.stdout.splitlines()
    check_uploaded(online.server)
    record_property("count", f"W&B online: 2 kill -9, one with 13 rows there and a checkpoint of 10, one with 13 and "
                    f"a checkpoint of 18; in the end {len(ALL_ROWS)} there, none twice, none missing")  # fmt: skip


FINISHED = """
from pathlib import Path
from test_run_log import Progress, config
from gpt.runs import run_log
from gpt.terminal import console

console.setup()
directory = Path(arguments[0])
cfg, progress = config("auto", log_model="last"), Progress(3, 1.0, 2, 3)
if not (directory / "metrics.jsonl").exists():
    with run_log.start(cfg, directory, -1) as log:
        for step, loss in enumerate((3.0, 2.0, 1.0, 1.5)):
            log.event({"step": step, "val/loss": loss}, [{"prompt": "p", "text": "t"}])
else:
    run_log.send_rest(cfg, directory, directory / "last_model.pt", progress)
"""


@pytest.mark.parametrize("before", ["WANDB_MODE=offline", pytest.param("WANDB_API_KEY=", marks=pytest.mark.exhaustive)])
def test_the_same_command_of_a_finished_run_sends_once_what_wandb_lacks(tmp_path, before):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "last_model.pt").write_bytes(b"weights")
    name, _, value = before.partition("=")
    with Server() as server:
        environment = {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), **server.environment, "WANDB_MODE": ""}

        def start(**variables):
            child = children().start(FINISHED, str(run_dir), **environment | variables)
            assert child.wait() == 0 and child.stderr == "", child.stderr
            return child.stdout

        assert "to upload" in start(**{name: value})
        assert server.received == [] and start(**{name: value}) == ""  # still away: no second folder, and no word
        printed = start()
        (run,) = server.runs.values()
        assert json.loads((run_dir / "wandb.json").read_text())["url"] in printed
        assert [row["step"] for row in run.rows] == [0, 1, 2, 3] and all("samples" in row for row in run.rows)
        assert {key: json.loads(run.summary)[key] for key in BEST} == {"best/val/loss": 1.0, "best/step": 2}
        n_received = len(server.received)
        assert start() == "" and len(server.received) == n_received  # W&B has it all


def test_a_run_that_wandb_never_knew_is_not_sent_afterwards(run_dir, root):
    RowFile(run_dir / "metrics.jsonl").append([{"step": 0, "val/loss": 1.0}])
    arguments = (config("online"), run_dir, run_dir / "last_model.pt", Progress(0, 1.0, 0, 0))
    assert not run_log.send_rest(*arguments)  # it was killed at its very end
    (run_dir / "last_model.pt").touch()
    assert run_log.send_rest(*arguments)
    assert not root.exists() and not (run_dir / "wandb.json").exists()


def test_a_rank_that_is_not_the_first_records_nothing(run_dir, root):
    with run_log.start(config("offline"), run_dir, -1, is_first=False) as record:
        record.event({"step": 0, "val/loss": 1.0}, [])
        record.checkpoint(run_dir, Progress(0, 1.0, 0, 0))
        record.finish(run_dir / "last_model.pt", Progress(0, 1.0, 0, 0))
        assert not record.stop_requested
    assert not root.exists() and not (run_dir / "metrics.jsonl").exists()


def summarise(directory: Path, mode: str, losses: dict[float, float | None]) -> None:
    """Tells W&B of a sweep over a learning rate, in which a job without a loss has failed."""
    configs = [{"optimizer.name": "adamw", "optimizer.lr": lr, "seed": 7} for lr in losses]
    statuses = ["failed" if loss is None else "completed" for loss in losses.values()]
    rows = [[lr, loss, status] for (lr, loss), status in zip(losses.items(), statuses, strict=True)]
    best = {"val/loss": 1.5, "settings": {"optimizer.lr": 0.5}}
    columns = ["optimizer.lr", "val/loss", "status\ud800"]
    run_log.sweep_summary(directory, "lr_sweep", config(mode).wandb, columns, rows, configs, statuses, best)


FIRST, SECOND = {0.5: 1.5, 0.25: None}, {0.5: 1.5, 0.25: 2.5, 0.125: math.nan}
SECOND_TABLE = [[0.5, 1.5, "completed"], [0.25, 2.5, "completed"], [0.125, None, "completed"]]


def test_a_sweep_is_a_run_with_its_leaderboard_and_figures(root, run_dir):
    Image.new("RGB", (2, 2)).save(run_dir / "curves.png")
    for losses in (FIRST, SECOND):
        summarise(run_dir, "offline", losses)
    (folder,) = recorded(root)
    assert len(list((root / "wandb").glob("superseded-offline-run-*"))) == 1
    run, (about,) = summary(folder), records(folder, "run")
    assert run["run_id"] == json.loads((run_dir / "wandb.json").read_text())["id"]
    assert (about["run_group"], about["job_type"], about["display_name"]) == ("lr_sweep", "sweep", "lr_sweep")
    assert (run["config"]["optimizer"], run["config"]["seed"]) == ({"name": "adamw", "lr": None}, 7)
    assert run["config"]["varied"] == {"optimizer.lr": [0.5, 0.25, 0.125]}
    results = run["summary"]
    assert (results["best/val/loss"], results["best/settings"]) == (1.5, {"optimizer.lr": 0.5})
    assert results["jobs"] == {"all": 3, "completed": 3}
    table = json.loads((folder / "files" / results["leaderboard"]["path"]).read_text())
    assert table == {"columns": ["optimizer.lr", "val/loss", "status\\ud800"], "data": SECOND_TABLE}
    assert (folder / "files" / results["curves"]["path"]).read_bytes() == (run_dir / "curves.png").read_bytes()


def test_evaluations_are_a_run_of_their_own_with_a_row_for_each_step_and_their_tables(root, run_dir):
    rows = [{"step": 3, "answers/ROUGE-L": 0.1}, {"step": 6, "answers/ROUGE-L": math.nan}]
    tables = {"answers": (["", "model"], [["ROUGE-L", "0.1 [0, 1]"]])}
    about = {"answers": {"seed": 1}}
    for _ in range(2):
        run_log.evaluation(run_dir, "mine", config("offline").wandb, about, rows, tables)
    (folder,) = recorded(root)
    run, (first,) = summary(folder), records(folder, "run")
    assert (first["run_group"], first["job_type"], first["display_name"]) == ("mine", "evaluate", "evaluation of mine")
    assert run["run_id"] == json.loads((run_dir / "wandb.json").read_text())["id"]
    assert run["config"]["answers"] == {"seed": 1} and run["summary"]["step"] == 6
    table = json.loads((folder / "files" / run["summary"]["answers"]["path"]).read_text())
    assert table["data"] == [["ROUGE-L", "0.1 [0, 1]"]]


SWEEPS = """
import time
from pathlib import Path
from test_run_log import FIRST, SECOND, summarise
from gpt.runs import wandb_run
from gpt.terminal import console

directory, finish, hasty = arguments
wandb_run.FINISH_TIMEOUT, wandb_run.HASTY_TIMEOUT = float(finish), float(hasty)
console.setup()
for losses in (FIRST, SECOND):
    began = time.monotonic()
    summarise(Path(directory), "auto", losses)
    print(time.monotonic() - began)
    if float(finish) < 1:
        break
"""


class Disturbed(Server):
    """Fails at one of the questions that only a table asks."""

    question: str | None = None
    reply: Any = None  # None: it never comes

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/graphql" and json.loads(body)["operationName"] == self.question:
            if self.reply is None:
                self._gone.wait()
            return self.reply
        return super().answer(path, body)


DISTURBANCES = {"no answer about the table": ("", None), "nonsense about the table": ("CreateArtifact", {"data": {}})}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Sweeps that are summed up at the same time: twice with a server that answers, once with each that does not."""
    servers, running = {}, {}
    for name in ("answers", *DISTURBANCES):
        folder, server = tmp_path_factory.mktemp("sweep"), Disturbed()
        server.question, server.reply = DISTURBANCES.get(name, (None, None))
        seconds = ("35", "5") if name == "answers" else ("0.5", "0.5")
        environment = {"WANDB_DIR": str(folder / "root"), "HOME": str(folder), **server.environment}
        running[name] = children().start(SWEEPS, str(folder), *seconds, **environment)
        servers[name] = server
    yield servers, running
    for server in servers.values():
        server.disappear()


def test_a_sweep_that_goes_on_replaces_what_its_run_says(sweeps):
    server, child = (found["answers"] for found in sweeps)
    assert (child.wait(), child.stderr) == (0, "")
    ((run_id, run),) = server.runs.items()
    url = f"http://127.0.0.1:{server.port}/entity/test/runs/{run_id}"
    assert child.stdout.splitlines()[::2] == [f"W&B, the whole sweep: {url}"] * 2
    results = json.loads(run.summary)
    assert results["jobs"] == {"all": 3, "completed": 3} and len(run.lines) == 2
    sent = {request.rpartition("/storage/")[2]: body for request, _, body in server.received if "/storage/" in request}
    assert json.loads(sent[results["leaderboard"]["path"]])["data"] == SECOND_TABLE


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_sweep_waits_a_short_time_for_a_server_that_fails_and_warns_once(sweeps, name):
    _, child = (found[name] for found in sweeps)
    assert child.wait() == 0, child.stderr
    (warning,) = [line for line in child.stderr.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: W&B ") and "sweep" in warning
    assert "Traceback" not in child.stderr  # of Python; W&B's own process panics at nonsense
    assert float(child.stdout.split()[-1]) < 15
