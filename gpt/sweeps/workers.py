"""Prepares the processes in which jobs run, that of the sweep or those of a launcher, and ends them."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gpt.errors import Interrupted, UserError, one_line
from gpt.files.paths import PROJECT_ROOT
from gpt.machine import rank_environment
from gpt.runs import interrupt
from gpt.terminal import console

# Of joblib and submitit, for a process that has been killed or has no more memory.
DEATHS = {"TerminatedWorkerError", "BrokenProcessPool", "FailedJobError", "UncompletedJobError"}
_threads: int | None = None  # of torch, when this process began
_is_worker = False  # this process is a launcher's
_is_busy = False  # with a job
_is_ending = False  # it has had a signal to end


class Ended(Exception):
    """The sweep ends: the job of this process has saved where it is, or has not started."""


def run_isolated(task: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """`task(cfg)` as if it were alone: nothing is left that a job before has set in torch, and a job that calls
    sys.exit, or gets a signal to end in a launcher's process, ends alone."""
    global _is_busy
    if is_ending():
        raise Ended if _is_worker else Interrupted(interrupt.late)
    _reset_torch()
    _is_busy = True
    try:
        return task(cfg)
    except SystemExit as error:
        argument = 0 if error.code is None else error.code
        code = argument if isinstance(argument, int) else 1
        raise UserError(f"the job called sys.exit({argument})", code=code) from error
    except Interrupted as error:
        if not _is_worker:
            raise
        raise Ended from error
    finally:
        _is_busy = False


def prepare_process(leave_group: bool = False) -> None:
    """Prepares a launcher's process: it ends when the launching process says so, and prints only what does not get
    mixed up with the lines of others. All of them are in each job's train.log. `leave_group`: a terminal's Ctrl-C goes
    to the launching process alone."""
    global _is_worker
    _is_worker = True
    signal.signal(signal.SIGTERM, _end)
    if leave_group and hasattr(os, "setpgid"):
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
    console.setup(quiet=True, silent=not rank_environment.read().is_first)


def is_ending() -> bool:
    """Whether no further job is to begin in this process."""
    return _is_ending or interrupt.late is not None


def explain(error: BaseException) -> str:
    """What has gone wrong with a job, in one line."""
    return one_line(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def are_elsewhere(config: DictConfig) -> bool:
    """Whether jobs may run on another machine than this one."""
    return any(name in str(config.hydra.launcher._target_) for name in ("submitit", "ray_cluster"))


@contextlib.contextmanager
def launching(config: DictConfig, n_jobs: int, end: Callable[[], None] | None = None) -> Iterator[None]:
    """What the processes of a launcher need: the way to this project, their share of the processor, and a word when
    they shall end, which is SIGTERM to all children of this process unless `end` does it. Raises Interrupted when they
    had to end, and UserError when one of them has died."""
    launcher = str(config.hydra.launcher._target_)
    if launcher.endswith("BasicLauncher"):
        yield
        return
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))}
    if "joblib" in launcher and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(threads_each(config.hydra.launcher.n_jobs, n_jobs))
    with _environment(variables), _passing_on_signals(end or _end_children) as received:
        try:
            yield
        except Exception as error:
            if not received and type(error).__name__ not in DEATHS:
                raise
            if not received:
                first_sentence = one_line(str(error).partition(". ")[0])  # plugins go on for half a page
                what = f"a job's process has died: {type(error).__name__}: {first_sentence}"
                raise UserError(what, remedy="the same command again goes on", code=1) from error
        if received:
            raise Interrupted(received[0])


def threads_each(at_once: int, n_jobs: int) -> int:
    """Threads for each of `n_jobs` jobs of which `at_once` run at a time (joblib: -1 is one for each processor)."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = at_once if at_once > 0 else max(1, processors + 1 + at_once)
    return max(1, processors // min(at_once, n_jobs))


def _reset_torch() -> None:
    """torch as it was when the process began."""
    global _threads
    import torch

    _threads = _threads or torch.get_num_threads()
    torch.set_num_threads(_threads)  # a resumed job computes with as many as it began with
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():  # saying so again would import torch._inductor: 1 s
        torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:  # else the jobs together reach the limit of versions of a compiled block
        torch._dynamo.reset()


def _end(number: int, frame: Any) -> None:
    global _is_ending
    _is_ending = True
    if _is_busy:
        raise Interrupted(number)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _passing_on_signals(end: Callable[[], None]) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM calls `end`, and is in the list; a second one ends this process at once. A terminal's
    Ctrl-C reaches no child: SIGINT is blocked here, which they inherit. In Windows, where none is blocked, it reaches
    all of them, and nothing is passed on."""
    received: list[int] = []
    if not hasattr(signal, "pthread_sigmask"):
        yield received
        return
    numbers = signal.SIGINT, signal.SIGTERM
    arrivals, arrived = os.pipe()
    os.set_blocking(arrived, False)

    def wait() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        while number := os.read(arrivals, 1)[0]:
            if number not in numbers:
                continue
            if received:
                os._exit(128 + number)
            received.append(number)
            end()

    # Whichever thread gets a signal (those of OpenBLAS and OpenMP do), and whatever this one waits for, the number is
    # written to the pipe at once.
    before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    descriptor = signal.set_wakeup_fd(arrived)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield received
    finally:
        os.write(arrived, b"\0")
        waiting.join()
        signal.set_wakeup_fd(descriptor)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(arrivals)
        os.close(arrived)


def _end_children() -> None:
    for child in _children():
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGTERM)


def _children() -> list[int]:
    """Processes that this one has started and that are still there."""
    children: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            children += map(int, path.read_text().split())
    return children
