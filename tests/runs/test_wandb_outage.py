"""W&B is away at the start of a run, in the middle or at its end: the run's result is the same, little time is lost,
and one warning says how to upload later what W&B has not got.

In the suite W&B has 2 seconds where it has 20 or 35; the tests marked exhaustive wait for the whole of it.
"""

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from wandb_server import Child, Run, Server, children, command, wait_for

from gpt.files.jsonl import read_rows
from gpt.runs import wandb_run

RUN = """
import atexit, signal, time
from pathlib import Path
from test_run_log import config
from gpt.runs import interrupt, run_log, wandb_run
from gpt.terminal import console
from gpt.errors import Interrupted

def lap(name):
    global began
    print(name, round(time.monotonic() - began, 2), flush=True)
    began = time.monotonic()

def log_rows(first):
    for step in range(first, first + 6):
        log.event({"step": step, "train/loss": 1 / (step + 1)}, [{"prompt": "p", "text": str(step)}] * (step % 2))

atexit.register(lap, "exited")  # runs after all that W&B registers
directory, init, finish, when, how = Path(arguments[0]), float(arguments[1]), float(arguments[2]), *arguments[3:]
wandb_run.INIT_TIMEOUT, wandb_run.FINISH_TIMEOUT = init, finish
wandb_run.HASTY_TIMEOUT = min(finish, wandb_run.HASTY_TIMEOUT)
console.setup()
interrupt.end_at_once()
began = time.monotonic()
try:
    with run_log.start(config("auto"), directory, -1) as log:
        lap("opened")
        log_rows(0)
        while log.wandb_run.sync_command is None and when != "start":  # W&B is not open yet
            time.sleep(0.01)
        if when != "end":
            pause("breaking")
        began = time.monotonic()
        log_rows(6)
        lap("rows")
        if when == "end":
            pause("breaking")
        began = time.monotonic()
        print("closing", flush=True)
        if how == "weights":
            log.wandb_run.files("last-model", "model", [directory / "metrics.jsonl"])
        if how == "interrupted":
            raise Interrupted(signal.SIGTERM)
except Interrupted as error:
    print(error)
lap("closed")
"""
ROWS = [{"step": step, "train/loss": 1 / (step + 1)} for step in range(12)]


@dataclass
class Outage:
    """A run, and the server that it cannot reach."""

    server: Server
    run_dir: Path
    child: Child

    @property
    def seconds(self) -> dict[str, float]:
        """What it took to open the record, to log six rows while W&B was away, to close the record, and to exit."""
        return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.]+)$", self.child.stdout, re.M)}

    @property
    def folder(self) -> Path:
        """W&B's of the run; the one of an attempt to go online before is not meant."""
        return sorted((self.run_dir / "wandb").glob("*run-*-*"))[0]  # offline-run-... comes before run-...

    @property
    def sync_command(self) -> str:
        (found,) = re.findall(r"to upload: (wandb sync .*)", self.child.stdout + self.child.stderr)
        return found


def begin(folder: Path, kind: str, when: str, how: str, init: float = 2, finish: float = 2) -> Outage:
    """Starts a run with a server that answers, unless it is away from the start."""
    server = Server()
    run_dir = folder / f"{kind}-{when}-{how}".replace(" ", "-")
    run_dir.mkdir()
    if when == "start":
        break_down(server, kind)
    child = children().start(
        RUN, str(run_dir), str(init), str(finish), when, how,
        HOME=str(folder), WANDB_DIR=str(run_dir), **server.environment,
    )  # fmt: skip
    return Outage(server, run_dir, child)


def break_down(server: Server, kind: str) -> None:
    if kind == "refuse":
        server.disappear()
    elif kind == "hang at finish":
        server.hang_at_finish = True
    else:
        server.broken = kind


def finish(outages: dict[tuple[str, str, str], Outage], wait_before: float = 0) -> None:
    """Breaks the servers down when they should, and waits for the runs."""
    for outage in outages.values():
        outage.child.wait_for("breaking")
    time.sleep(wait_before)
    for (kind, when, _), outage in outages.items():
        if when in ("middle", "end"):
            break_down(outage.server, kind)
        outage.child.go_on()
    for outage in outages.values():
        outage.child.wait()


KINDS = [
    ("refuse", "start", "ends"), ("error", "start", "ends"), ("hang", "start", "ends"),
    ("refuse", "middle", "ends"), ("error", "middle", "ends"), ("hang", "middle", "ends"),
    ("hang at finish", "end", "ends"), ("deny", "middle", "ends"), ("hang", "middle", "interrupted"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outages(tmp_path_factory):
    """All runs at once: they mostly wait."""
    folder = tmp_path_factory.mktemp("outages")
    found = {kind: begin(folder, *kind) for kind in KINDS}
    finish(found)
    yield found
    for outage in found.values():
        outage.server.disappear()


def check(outage: Outage, when: str, how: str, opened: float, closed: float) -> None:
    """The result is on disk, one warning was printed, and no more than these seconds were lost."""
    assert outage.child.wait() == 0, outage.child.stderr
    assert read_rows(outage.run_dir / "metrics.jsonl") == ROWS
    assert len(read_rows(outage.run_dir / "samples.jsonl")) == 6
    *warnings, warning = outage.child.stderr.splitlines()
    assert [w.partition("(")[0] for w in warnings] == ["warning: W&B does not take weights "] * (how == "weights")
    if when == "start":
        assert warning.startswith("warning: W&B cannot be reached (")
        assert warning.endswith("; this run is recorded offline")
        assert outage.sync_command == f"wandb sync {outage.folder}"
    else:
        assert warning.startswith("warning: W&B has not received all of the run (")
        assert outage.sync_command == f"wandb sync --include-online {outage.folder}"
    seconds = outage.seconds
    assert seconds["opened"] < opened and seconds["closed"] + seconds["exited"] < closed, seconds
    assert seconds["rows"] < 5, seconds  # one wandb.Table among them would take 19


def upload(outages: list[Outage]) -> dict[str, Run]:
    """Runs the printed commands, those that differ in the folder only as one. Returns what a server has got."""
    commands = [outage.sync_command.rpartition(" ") for outage in outages]
    with Server() as server:
        for start in {start for start, _, _ in commands}:
            folders = " ".join(folder for other, _, folder in commands if other == start)
            command(f"{start} {folders}", HOME=str(outages[0].run_dir), **server.environment)
        return server.runs


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_an_outage_costs_a_warning_and_little_time_and_no_row(outages, kind):
    check(outages[kind], *kind[1:], opened=2, closed=2 + 15)


def test_what_wandb_has_not_got_is_uploaded_later(outages, record_property):
    uploaded = upload(list(outages.values()))
    for kind, outage in outages.items():
        run = uploaded[json.loads((outage.run_dir / "wandb.json").read_text())["id"]]
        assert [{k: row[k] for k in ROWS[0]} for row in run.rows] == ROWS, kind
        assert [row["step"] for row in run.rows if "samples" in row] == [1, 3, 5, 7, 9, 11], kind
        assert run.exit_code == (143 if kind[2] == "interrupted" else 0), kind
    slowest = {name: max(outage.seconds[name] for outage in outages.values()) for name in ("opened", "rows", "closed")}
    record_property("count", f"W&B away: {len(outages)} runs, {len(ROWS)} rows of each on disk and uploaded later; "
                    f"slowest, with 2 s for each of W&B's timeouts: {slowest}")  # fmt: skip


def test_an_interrupted_run_is_marked_as_such(tmp_path):
    outage = begin(tmp_path, "none", "never", "interrupted")
    finish({("none", "never", "interrupted"): outage})
    (run,) = outage.server.runs.values()
    outage.server.disappear()
    assert (outage.child.wait(), outage.child.stderr) == (0, "")
    assert run.exit_code == 143 and len(run.lines) == len(ROWS)


@pytest.mark.parametrize("when", ["start", "end"])
def test_a_signal_does_not_wait_for_a_server_that_does_not_answer(tmp_path, when):
    outage = begin(tmp_path, "hang", when, "ends", init=60, finish=60)
    if when == "end":
        outage.child.wait_for("breaking")
        break_down(outage.server, "hang")
        outage.child.go_on()
        outage.child.wait_for("closing")
        time.sleep(0.5)
    else:
        wait_for(lambda: outage.server.received, "W&B does not ask")
    began = time.monotonic()
    os.kill(outage.child.pid, signal.SIGTERM)
    assert outage.child.wait() == 0, outage.child.stderr
    assert time.monotonic() - began < 5
    assert "interrupted by SIGTERM" in outage.child.stdout
    outage.server.disappear()


def test_the_dashboards_stop_button_is_a_flag_and_no_exception(tmp_path):
    code = """
import time
from pathlib import Path
from test_run_log import config
from gpt.runs import run_log
from gpt.terminal import console

console.setup()
with run_log.start(config("auto"), Path(arguments[0]), -1) as log:
    log.event({"step": 0, "val/loss": 1.0}, [])
    end = time.monotonic() + 40
    while not log.stop_requested and time.monotonic() < end:
        time.sleep(0.02)
    print("stopped", log.stop_requested)
"""
    with Server() as server:
        server.stopped = True
        child = children().start(code, str(tmp_path), HOME=str(tmp_path), WANDB_DIR=str(tmp_path), **server.environment)
        assert (child.wait(), child.stderr) == (0, "")
        (run,) = server.runs.values()
    assert "stopped True" in child.stdout.splitlines()
    assert run.exit_code == 0 and [row["step"] for row in run.rows] == [0]


@pytest.mark.exhaustive  # 80 s
def test_with_wandbs_real_timeouts_no_time_is_lost_at_the_start_and_60_seconds_at_the_end(tmp_path, record_property):
    found = {}
    for kind in [*KINDS, ("hang", "middle", "weights")]:
        found[kind] = begin(tmp_path, *kind, init=wandb_run.INIT_TIMEOUT, finish=wandb_run.FINISH_TIMEOUT)
    finish(found, wait_before=17)  # W&B sends every 15 s: the server has the first six rows when it goes away
    for kind, outage in found.items():
        check(outage, *kind[1:], opened=2, closed=60)
        if kind[1] != "start":
            (run,) = outage.server.runs.values()
            assert len(run.lines) in (6, 12), kind
        outage.server.disappear()
    uploaded = upload(list(found.values()))
    rows = [[{k: row[k] for k in ROWS[0]} for row in run.rows] for run in uploaded.values()]
    assert rows == [ROWS] * len(found)
    slowest = {name: max(o.seconds[name] for o in found.values()) for name in ("opened", "rows", "closed", "exited")}
    record_property("count", f"W&B away, real timeouts: {len(found)} runs, slowest {slowest} seconds")
