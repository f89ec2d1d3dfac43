"""SIGTERM and SIGINT in every phase of a run: it saves, says how to go on, and exits with the shell's code."""

import os
import random
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace

import pytest
from conftest import ROOT
from test_kill import SETTINGS, Run
from tracing import fork, text_of

from gpt import loop
from gpt.config import launch
from gpt.errors import UserError
from gpt.runs import checkpoint, interrupt
from gpt.sweeps import jobs
from gpt.terminal import console

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
# phase -> the function of this project, or of W&B, whose n-th call the signal arrives in
AT_ONCE = {
    "reading prepared data": ("preparation.py", "ensure", 1),
    "building the model": ("model.py", "init_weights", 1),
}
SAVING = {
    "the first evaluation": ("loop.py", "evaluate", 1),
    "a step": ("loop.py", "train_step", 3),
    "a micro-batch": ("objective.py", "loss", 8),
    "an evaluation": ("loss.py", "cross_entropy", 16),
    "a sample": ("sampling.py", "next_logits", 7),
    "logging": ("run_log.py", "event", 3),
    "writing a checkpoint": ("checkpoint.py", "write_files", 2),
    "removing a checkpoint": ("checkpoint.py", "prune", 3),
    "the last step": ("loop.py", "train_step", 6),
}


class Interruptible(Run):
    """The run of test_kill as a command: with exit codes, and with a signal in a certain phase."""

    def command(self):
        """What train.py does, without Hydra."""
        launch.launch(self, "train")

    def signalled(self, number, file, function, nth, times=1):
        """The command, which gets a signal when it enters `function` for the n-th time; it leaves a note of the steps
        that it had begun by then and when."""
        calls = begun = 0

        def watch(frame, event, _):
            nonlocal calls, begun
            if event != "call":
                return
            code = frame.f_code
            begun += code is loop.train_step.__code__
            if code.co_name == function and os.path.basename(code.co_filename) == file:
                calls += 1
                if calls == nth:
                    sys.setprofile(None)
                    self.note.write_text(f"{begun} {time.monotonic()}")
                    for _ in range(times):
                        os.kill(os.getpid(), number)

        def body():
            for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
                del sys.modules[name]  # it may have a connection of other tests in this process
            sys.setprofile(watch)
            threading.setprofile(watch)
            self.command()

        return body

    @property
    def note(self):
        return self.directory.with_name("note")


def finish(body):
    """Runs a function in a child to its end: (exit code, stdout and stderr)."""
    with tempfile.TemporaryFile() as output:
        child = fork(body, output)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, text_of(output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Interruptible(tmp_path_factory.mktemp("signals")).undisturbed()


def complaints(output):
    lines = [line for line in output.splitlines() if line.startswith(("error", "warning", "Traceback"))]
    return [line for line in lines if "prompts of the samples lose their beginning" not in line]


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", AT_ONCE)
def test_before_the_first_step_a_signal_ends_the_run_at_once(undisturbed, phase, number):
    run, _ = undisturbed
    code, output = finish(run.fresh().signalled(number, *AT_ONCE[phase]))
    assert run.note.exists(), f"the phase was not reached: {output}"
    run.note.unlink()
    assert code == CODES[number], output
    assert complaints(output) == [f"error: interrupted by {number.name}"], output
    assert not (run.directory / "metrics.jsonl").exists()


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_while_wandb_starts_in_a_thread_a_signal_ends_the_run_soon_and_it_goes_on_to_the_same_end(
    undisturbed, number, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run, expected = undisturbed
    slow = replace(run.cfg.sample, max_new_tokens=500)  # else the run would be over before W&B has started
    monkeypatch.setattr(run, "cfg", replace(run.cfg, wandb=replace(run.cfg.wandb, mode="offline"), sample=slow))
    code, output = finish(run.fresh().signalled(number, "wandb_init.py", "init", 1))
    ended = time.monotonic()
    assert ended - float(run.note.read_text().split()[1]) < 5
    run.note.unlink()
    assert code == CODES[number], output
    (line,) = complaints(output)
    assert line.startswith(f"error: interrupted by {number.name}"), line
    code, output = finish(run.command)
    assert code == 0, output
    rows, _, *rest = run.result()  # all but the samples, which are longer here
    assert [rows, *rest] == [expected[0], *expected[2:]]


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", SAVING)
def test_while_it_trains_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_end(
    undisturbed, phase, number, record_property
):
    run, expected = undisturbed
    code, output = finish(run.fresh().signalled(number, *SAVING[phase]))
    ended = time.monotonic()
    begun, when = run.note.read_text().split()
    run.note.unlink()
    assert code == CODES[number], output
    assert ended - float(when) < 5
    (line,) = complaints(output)
    found = re.fullmatch(rf"error: interrupted by {number.name}: step_(\d+) is saved; to go on: (.*)", line)
    assert found, line
    assert int(begun) - 1 <= int(found[1]) <= int(begun)  # no step was begun after the signal, at most one given up
    assert shlex.split(found[2]) == ["python", str(ROOT / "train.py"), f"out_dir={run.directory}"]
    path = checkpoint.listed(run.directory / "checkpoints")[-1]
    assert checkpoint.verify(path).step == int(found[1])
    code, output = finish(run.command)
    assert code == 0, output
    assert f"resuming from {path.name}" in output
    assert run.result() == expected
    record_property("count", f"{number.name} in {phase}: step {found[1]} saved after {begun} begun, exit code "
                             f"{CODES[number]}, resumed to the same end")  # fmt: skip


ENDS = {
    "nothing goes wrong": lambda: None,
    "an error is reported": lambda: (_ for _ in ()).throw(UserError("wrong")),
    "a bug is reported": lambda: (_ for _ in ()).throw(OSError(5, "wrong", "name")),
    "a signal is reported": lambda: os.kill(os.getpid(), signal.SIGINT),
}


SLOW_ENDS = [pytest.param(end, marks=pytest.mark.exhaustive) for end in ENDS if end.startswith("a ")]


@pytest.mark.parametrize("end", [end for end in ENDS if not end.startswith("a ")] + SLOW_ENDS)
def test_on_every_line_from_the_start_of_the_handlers_to_the_exit_a_signal_gives_its_code_and_no_traceback(
    end, monkeypatch
):
    """Also on the lines that print an error, and on those that handle a first signal."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    watched = {launch.__file__, console.__file__, interrupt.__file__}

    def signalled(nth, number=signal.SIGTERM):
        lines = 0

        def line(frame, event, _):
            nonlocal lines
            if event == "line" and signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler):
                lines += 1
                if lines == nth:
                    os.kill(os.getpid(), number)
            return line

        def body():
            for each in CODES:
                signal.signal(each, signal.SIG_DFL)
            sys.settrace(lambda frame, event, _: line if frame.f_code.co_filename in watched else None)
            try:
                launch.launch(ENDS[end], "train")
            finally:
                os.write(2, f"{lines} lines\n".encode())

        return body

    _, output = finish(signalled(0))
    total = int(re.search(r"(\d+) lines", output)[1])
    assert total > 25
    for nth in range(1, total + 1):
        number = (signal.SIGTERM, signal.SIGINT)[nth % 2]
        code, output = finish(signalled(nth, number))
        assert "Traceback" not in output and "Exception ignored" not in output, f"line {nth}: {output}"
        assert code == CODES[number] or (code == 130 and end == "a signal is reported"), f"line {nth}: {output}"


def test_a_second_signal_exits_at_once(undisturbed):
    run, _ = undisturbed
    code, output = finish(run.fresh().signalled(signal.SIGTERM, *SAVING["a step"], times=2))
    assert code == 143 and complaints(output) == []
    assert not checkpoint.listed(run.directory / "checkpoints")[1:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(6))
def test_a_signal_at_60_random_moments(undisturbed, seed, record_property):
    run, expected = undisturbed
    draw = random.Random(seed)
    started = time.monotonic()
    finish(run.fresh().command)
    whole = time.monotonic() - started
    landed = 0
    while landed < 10:
        number = draw.choice(list(CODES))
        with tempfile.TemporaryFile() as output:
            child = fork(run.fresh().command, output)
            ended = os.pidfd_open(child)
            select.select([ended], [], [], draw.uniform(0, whole))
            os.kill(child, number)
            sent = time.monotonic()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.close(ended)
            text = text_of(output)
        assert time.monotonic() - sent < 5
        # Before Python has set handlers up the signal itself ends the process; after the last step the run is complete.
        assert code in (0, CODES[number], -number), text
        assert "Traceback" not in text or code == -number, text
        landed += code == CODES[number]
        assert finish(run.command)[0] == 0
        assert run.result() == expected, f"seed {seed}"
    record_property("count", f"seed {seed}: {landed} signals at random moments landed, resumed to the same end")


def test_a_sweep_is_ended_by_a_signal_with_the_running_jobs_step_saved(tmp_path):
    arguments = [
        sys.executable, str(ROOT / "train.py"), "-m", "seed=1,2", *SETTINGS, f"hydra.sweep.dir={tmp_path / 'sweep'}",
        f"data.prepared_dir={tmp_path / 'data'}", "train.max_steps=100000", "train.log_every=10",
    ]  # fmt: skip
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        for line in process.stdout:
            if line.startswith("step 20/"):
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    *_, line = complaints(stderr)  # before it, that other processes are using the processor
    job, other = jobs.read(tmp_path / "sweep")
    assert re.fullmatch(r"error: interrupted by SIGINT: step_\d+ is saved", line), line
    assert f"2 of 2 jobs are not done; to go on: python {ROOT / 'train.py'} -m seed=1,2 " in stdout  # the one way
    assert f"job {job.id} (seed=1) did not end" in stdout and (job.status, other.status) == ("interrupted", "new")
    assert checkpoint.listed(job.folder / "checkpoints") and not (other.folder / "checkpoints").exists()
