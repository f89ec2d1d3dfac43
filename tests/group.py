"""Starts real process groups: torchrun with gloo on the CPU, on a script or on a few lines of Python."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conftest import ROOT

LINES = """\
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from gpt.config.schema import ParallelConfig
from gpt.machine import process_group
with process_group.opened(ParallelConfig("ddp", {limit}, 60.0)) as ranks:
"""


def command(n: int, *arguments: str, options: Sequence[str] = ()) -> list[str]:
    """What starts `n` ranks of a script with its arguments."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *options]
    return ["nice", "-n", "5", *launcher, *arguments]


def environment(**changes: str) -> dict[str, str]:
    """As a user has it: nothing of it says that there are ranks."""
    return (
        {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"WANDB_MODE": "disabled"} | changes
    )


def start(n: int, *arguments: str, options: Sequence[str] = (), **changes: str) -> subprocess.Popen:
    """`n` ranks, in a session of their own so that all of them can be ended."""
    return subprocess.Popen(
        command(n, *arguments, options=options), cwd=ROOT, env=environment(**changes), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    """Exit code of torchrun, and what it and all ranks have printed; ends them all after so many seconds."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for rank in [*ranks_of(process), process.pid]:
            os.kill(rank, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\n(ended after {seconds} s)"
    return process.returncode, output


def run(n: int, *arguments: str, options: Sequence[str] = (), **changes: str) -> tuple[int, str]:
    return finish(start(n, *arguments, options=options, **changes))


def lines(folder: Path, n: int, body: str, limit: float = 20.0, after: str = "") -> tuple[int, str]:
    """Runs a few lines of Python in `n` ranks, in which `ranks` is the group, and `after` outside of it."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    script = folder / "lines.py"
    script.write_text(LINES.format(root=str(ROOT), tests=str(ROOT / "tests"), limit=limit) + indented + after)
    return run(n, str(script))


def ranks_of(torchrun: subprocess.Popen) -> list[int]:
    """The processes of the ranks, in the order in which they were started, which is that of their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == torchrun.pid:
            found.append(int(path.parent.name))
    return sorted(found)


def wait_for(condition, seconds: float = 120):
    """What `condition()` returns as soon as that is true. Raises AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def own_lines(output: str) -> list[str]:
    """What ranks have printed, without torchrun's report."""
    lines = output.splitlines()
    return [line for line in lines if line.startswith(("error:", "warning:", "interrupted", "rank ", "Traceback"))]
