"""Starts real process groups: torchrun with gloo on the CPU, on a script or on a few lines of Python."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import (
    ROOT,
    adamw_config,
    data_config,
    made_split,
    model_config,
    muon_config,
    schedule_config,
    train_section,
)

from gpt import loop, optim
from gpt.config.optimizers import OptimizerConfig
from gpt.config.schema import METRIC
from gpt.data.batching import Batches, TrainBatches, eval_batches
from gpt.machine.machine import Machine
from gpt.machine.ranks import Ranks
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN
from gpt.progress import Progress

SHARDED = ", __import__('gpt.machine.sharding', fromlist=['']).ShardedGroup"
LINES = """\
import sys
sys.path[:0] = [{root!r}, {tests!r}]
sys.stdout = open(1, "w", buffering=1, closefd=False)  # torchrun's -u lets the lines of two ranks run into each other
import torch
torch.set_num_threads(1)
from gpt.config.schema import ParallelConfig
from gpt.machine import process_group
with process_group.opened(ParallelConfig("ddp", {limit}, 60.0){kind}) as ranks:
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


def lines(
    folder: Path, n: int, body: str, limit: float = 20.0, after: str = "", sharded: bool = False
) -> tuple[int, str]:  # fmt: skip
    """Runs a few lines of Python in `n` ranks, in which `ranks` is the group, and `after` outside of it."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    script = folder / "lines.py"
    start = LINES.format(root=str(ROOT), tests=str(ROOT / "tests"), limit=limit, kind=SHARDED if sharded else "")
    script.write_text(start + indented + after)
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


def course(ranks: Ranks, optimizer: OptimizerConfig, dtype: torch.dtype, rows: int, steps: int = 50) -> list[float]:
    """The losses of a few steps of a small model in `dtype`, the last validation loss, and the sum of its weights.

    Documents are packed into `rows` rows a step, one at a time, some steps have fewer; gradients are clipped.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(3)
        model = GPT(model_config(tie_weights=False), 50)
        train = train_section(tokens_per_step=16 * rows, micro_batch=1, max_steps=steps, log_every=1, eval_every=steps)
        data, val = data_config(mask="all"), made_split([7, 19, 12, 30], seed=1, name="val")
        read = TrainBatches(made_split([9, 17, 4, 12, 30, 2] * 3), data, 16, train, 3, ranks.share)
        batches = Batches(read, eval_batches(val, data, 16, train), None, steps, "train.max_steps")
        cfg = SimpleNamespace(train=train, schedule=schedule_config(), seed=0)
        machine = Machine(torch.device("cpu"), ranks=ranks)
        built = optim.build(model, optimizer)
        rows_of_metrics = [
            event.row for event in loop.fit(model, built, NEXT_TOKEN, batches, cfg, machine, Progress()) if event.row
        ]
        losses = [row["train/loss"] for row in rows_of_metrics if "train/loss" in row]
        weights = sum(parameter.abs().sum().item() for parameter in model.parameters())
        return [*losses, rows_of_metrics[-1][METRIC], rows_of_metrics[-1]["tokens"], weights]
    finally:
        torch.set_default_dtype(before)


CASES = [
    (adamw_config(lr=1e-2), torch.float64, 3),
    (adamw_config(lr=1e-2), torch.float64, 1),  # of two ranks one has no row
    (muon_config(lr=1e-2, adamw_lr=3e-3), torch.float64, 3),
    (adamw_config(lr=1e-2), torch.float32, 3),
]
