"""The processes in which jobs run: each job as if it were alone, and signals that reach all of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from gpt.errors import Interrupted, UserError
from gpt.runs import interrupt
from gpt.sweeps import workers
from gpt.terminal import console

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
CFG = OmegaConf.create({"seed": 1})


def launcher(target, **values):
    return OmegaConf.create({"hydra": {"launcher": {"_target_": target, **values}}})


def test_a_job_gets_its_configuration_and_gives_its_result():
    assert workers.run_isolated(lambda cfg: cfg.seed + 1, CFG) == 2


@pytest.mark.parametrize(
    ("argument", "shown", "code"),
    [((), "0", 0), ((0,), "0", 0), ((3,), "3", 3), (("no\nway",), "no\nway", 1), ((None,), "0", 0)],
)
def test_a_job_that_calls_sys_exit_fails_alone_with_the_code_that_it_would_have_had(argument, shown, code):
    with pytest.raises(UserError) as caught:
        workers.run_isolated(lambda cfg: sys.exit(*argument), CFG)
    assert (caught.value.what, caught.value.code) == (f"the job called sys.exit({shown})", code)
    assert workers.run_isolated(lambda cfg: "the next one", CFG) == "the next one"


@pytest.mark.parametrize("error", [ValueError("x"), UserError("x", code=4), MemoryError(), Interrupted(2)], ids=repr)
def test_any_other_error_of_a_job_is_what_it_was(error):
    def task(cfg):
        raise error

    with pytest.raises(type(error)) as caught:
        workers.run_isolated(task, CFG)
    assert caught.value is error
    assert not workers.is_ending()


def test_a_signal_while_a_job_writes_its_last_files_lets_it_end_and_no_other_begin(monkeypatch):
    def task(cfg):
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGINT)
        return "done"

    monkeypatch.setattr(interrupt, "late", None)
    assert workers.run_isolated(task, CFG) == "done" and workers.is_ending()
    with pytest.raises(Interrupted) as caught:
        workers.run_isolated(task, CFG)
    assert caught.value.code == 130


def state():
    return torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def test_what_a_job_sets_in_torch_is_gone_before_the_next_one():
    def careless(cfg):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(before[1] + 1)
        torch.use_deterministic_algorithms(True)
        seen.append(state())
        raise ValueError

    before = state()
    seen: list[tuple] = []
    assert workers.run_isolated(lambda cfg: state(), CFG) == before
    with pytest.raises(ValueError):
        workers.run_isolated(careless, CFG)
    assert seen == [(torch.float64, before[1] + 1, True)]
    assert workers.run_isolated(lambda cfg: state(), CFG) == before == (torch.float32, 1, False)


def test_each_job_may_compile_as_many_versions_as_one_that_is_alone():
    import torch._dynamo.testing

    def task(cfg):
        torch.compile(double, backend=counter, dynamic=False)(torch.ones(next(sizes)))

    def double(x):
        return x + x

    with torch._dynamo.config.patch(recompile_limit=2):
        counts = []
        for run in (lambda: task(CFG), lambda: workers.run_isolated(task, CFG)):
            torch._dynamo.reset()
            counter, sizes = torch._dynamo.testing.CompileCounter(), iter(range(2, 9))
            for _ in range(5):
                run()
            counts.append(counter.frame_count)
    assert counts == [2, 5]


@pytest.mark.parametrize(
    ("processors", "at_once", "n_jobs", "expected"),
    [
        (8, 2, 10, 4), (8, 3, 10, 2), (8, 20, 50, 1), (8, 1, 9, 8), (8, -1, 20, 1), (8, -1, 2, 4), (8, -2, 20, 1),
        (8, -5, 20, 2), (8, -100, 20, 8), (8, 4, 1, 8), (1, 2, 2, 1), (2, 2, 12, 1),
    ],
)  # fmt: skip
def test_the_processors_are_shared_out_among_the_jobs_that_run_at_once(
    monkeypatch, processors, at_once, n_jobs, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    assert workers.threads_each(at_once, n_jobs) == expected


def test_the_processes_of_a_launcher_find_the_project_and_know_their_share_and_this_one_stays_as_it_was(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with workers.launching(launcher(JOBLIB, n_jobs=2), 12):
        assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine" and os.environ["OMP_NUM_THREADS"] == "3"
    with workers.launching(launcher(SLURM), 12):
        assert "OMP_NUM_THREADS" not in os.environ  # the other machine has processors of its own
    with workers.launching(launcher(BASIC), 12):
        assert dict(os.environ) == before  # the jobs run in this process
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # a person knows better
    with workers.launching(launcher(JOBLIB, n_jobs=2), 12):
        assert os.environ["OMP_NUM_THREADS"] == "5"
    assert dict(os.environ) == before | {"OMP_NUM_THREADS": "5"}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(("target", "elsewhere"), [(BASIC, False), (JOBLIB, False), (SLURM, True)])
def test_only_jobs_of_submitit_may_run_elsewhere(target, elsewhere):
    assert workers.are_elsewhere(launcher(target)) is elsewhere


@pytest.mark.parametrize("name", sorted(workers.DEATHS))
def test_a_process_of_a_launcher_that_dies_is_an_error_for_people(name):
    death = type(name, (Exception,), {})("a worker has\n been terminated. Half a page follows" + "x" * 5000)
    with pytest.raises(UserError) as caught, workers.launching(launcher(JOBLIB, n_jobs=2), 2):
        raise death
    assert caught.value.code == 1 and caught.value.__cause__ is death
    assert caught.value.what == f"a job's process has died: {name}: a worker has been terminated"
    assert caught.value.remedy == "the same command again goes on"


@pytest.mark.parametrize("target", [BASIC, JOBLIB, SLURM])
def test_any_other_error_of_a_launcher_is_what_it_was(target):
    with pytest.raises(UserError, match="mine"), workers.launching(launcher(target, n_jobs=2), 2):
        raise UserError("mine")


CHILD = r"""
import os, signal, sys, time
def note(number, frame):
    os.write(1, f"child {number}\n".encode())
    if sys.argv[1] == "ends":
        sys.exit()
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
os.write(1, b"ready\n")
for _ in range(200):
    time.sleep(0.1)
"""
PARENT = """
import signal, subprocess, sys, threading, time
from omegaconf import OmegaConf
from gpt.runs import interrupt
from gpt.sweeps import workers
from gpt.errors import Interrupted
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("the handler of before"))
# Threads from before, as those of OpenBLAS: the kernel may give any of them a signal of the process.
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
config = OmegaConf.create({"hydra": {"launcher": {"_target_": "submitit"}}})
try:
    with workers.launching(config, 2):
        children = [subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]) for _ in range(2)]
        print("launched", flush=True)
        for child in children:
            child.wait()
        if sys.argv[2] == "ends":
            raise RuntimeError("the children have ended, says a launcher")
except Interrupted as error:
    print("parent", error.code, [child.returncode for child in children], flush=True)
"""


@contextlib.contextmanager
def parent(children):
    """A process with two children, in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-c", PARENT, CHILD, children]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, process_group=0,
        env=os.environ | {"PYTHONUNBUFFERED": ""},  # else a line is written in pieces
    ) as process:  # fmt: skip
        try:
            assert sorted(process.stdout.readline() for _ in range(3)) == ["launched\n", "ready\n", "ready\n"]
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_goes_on_to_all_processes_of_a_launcher_as_sigterm(number, code):
    with parent("ends") as process:
        process.send_signal(number)
        output = process.communicate(timeout=10)[0]
        assert output.splitlines() == ["child 15", "child 15", f"parent {code} [0, 0]"]
        assert process.returncode == 0


def test_ctrl_c_in_a_terminal_reaches_the_jobs_once_and_a_second_one_ends_the_launching_process():
    with parent("stays") as process:
        os.killpg(process.pid, signal.SIGINT)  # to all processes of the terminal's foreground group
        assert [process.stdout.readline() for _ in range(2)] == ["child 15\n"] * 2
        assert process.poll() is None
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 130 and time.monotonic() - started < 5
        os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout.read() == ""  # no child has seen a SIGINT


@pytest.fixture
def worker(monkeypatch, logger):
    """This process as one of a launcher's."""
    before = signal.getsignal(signal.SIGTERM)
    for name in ("_is_worker", "_is_busy", "_is_ending"):
        monkeypatch.setattr(workers, name, False)
    workers.prepare_process(launcher(SLURM))  # of joblib it would get a process group of its own
    yield
    signal.signal(signal.SIGTERM, before)
    console.setup()


def test_a_process_of_a_launcher_is_quiet(worker, capsys):
    console.say("a line of a job")
    console.announce("job 1")
    console.error("broken")
    assert capsys.readouterr() == ("job 1\n", "error: broken\n")


def test_in_a_process_of_a_launcher_a_job_that_is_asked_to_end_ends_and_no_other_begins(worker):
    def task(cfg):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the job went on")

    assert workers.run_isolated(lambda cfg: "done", CFG) == "done" and not workers.is_ending()
    for job in (task, lambda cfg: "begun"):
        with pytest.raises(workers.Ended):
            workers.run_isolated(job, CFG)
        assert workers.is_ending()


def test_between_two_jobs_a_signal_waits_for_the_next_one(worker):
    os.kill(os.getpid(), signal.SIGTERM)
    assert workers.is_ending()
    with pytest.raises(workers.Ended):
        workers.run_isolated(lambda cfg: "begun", CFG)


def test_a_job_that_has_saved_and_says_that_it_was_interrupted_ends_a_launchers_process_too(worker):
    def task(cfg):
        raise Interrupted(signal.SIGTERM, "saved")  # as train.py does

    with pytest.raises(workers.Ended) as caught:
        workers.run_isolated(task, CFG)
    assert str(caught.value.__cause__) == "interrupted by SIGTERM: saved"


def test_user_errors_keep_their_text_and_bugs_name_their_type():
    assert workers.explain(UserError("what", "where", "remedy")) == "what (where); remedy"
    assert workers.explain(KeyError("key")) == "KeyError: 'key'"
