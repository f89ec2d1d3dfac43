"""Reads which rank of how many this process is, from the environment that torchrun or SLURM gives it. No torch.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Of SLURM's tasks only those
are ranks of one run whose batch script has exported MASTER_ADDR, which SLURM itself does not set.
"""

import logging
import os
import re
from dataclasses import dataclass

from gpt.errors import UserError

log = logging.getLogger(__name__)

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, N_PORTS = 20_000, 10_000  # of SLURM's jobs that name none: one each, by their number


@dataclass(frozen=True)
class RankEnvironment:
    """The place of a process among those that were started with it; by default it was started alone."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    local_count: int = 1
    address: str = ""  # where all ranks meet
    port: int = 0
    has_agent: bool = False  # torchrun itself answers at that address, else the first rank has to
    attempt: int = 0  # how often torchrun has started the ranks again

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read() -> RankEnvironment:
    """The place of this process. Raises UserError for an environment that is incomplete."""
    values = os.environ
    if values.get("WORLD_SIZE", "1") == "1" and "RANK" not in values:
        is_slurm = "MASTER_ADDR" in values and int(values.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in values
        return of_slurm() if is_slurm else RankEnvironment()
    missing = [name for name in TORCHRUN if not values.get(name)]
    if missing:
        size = values.get("WORLD_SIZE")
        remedy = "start ranks with torchrun, or unset RANK and WORLD_SIZE to run alone"
        raise UserError(f"WORLD_SIZE={size} without {', '.join(missing)}", "environment", remedy)
    count, rank = number("WORLD_SIZE"), number("RANK")
    return RankEnvironment(
        rank=rank,
        count=count,
        local_rank=number("LOCAL_RANK", rank),
        local_count=number("LOCAL_WORLD_SIZE", count),
        address=values["MASTER_ADDR"],
        port=number("MASTER_PORT"),
        has_agent=values.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def of_slurm() -> RankEnvironment:
    """The place of one of the tasks of an `srun`."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or "1"  # 4(x2),3
    return RankEnvironment(
        rank=number("SLURM_PROCID"),
        count=number("SLURM_NTASKS"),
        local_rank=number("SLURM_LOCALID"),
        local_count=int(re.match(r"\d*", tasks)[0] or 1),
        address=os.environ["MASTER_ADDR"],
        port=number("MASTER_PORT", port_of_job()),
    )


def port_of_job() -> int:
    """A port for the ranks of this job of SLURM: below those that systems give to whoever connects to another one."""
    return FIRST_PORT + number("SLURM_JOB_ID", 0) % N_PORTS


def is_first() -> bool:
    """Whether this process is the first rank, or alone; also where the environment is incomplete."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" or read().is_first


def warn_alone(parallel: str) -> None:
    """Says that one process shares nothing where its user has chosen how several would (`parallel.name`)."""
    if parallel != "auto" and read().count == 1:
        start = "torchrun --standalone --nproc-per-node=2 train.py ... starts two that do"
        log.warning(f"parallel={parallel}: there is one process, which shares its steps with no other; {start}")


def command() -> list[str]:
    """What starts Python here as this process was started, with as many ranks."""
    place = read()
    if not place.has_agent or place.count == 1:
        return ["python"] if place.count == 1 else ["srun", "python"]
    n_machines = -(-place.count // place.local_count)
    machines = "--standalone" if n_machines == 1 else f"--nnodes={n_machines}"
    return ["torchrun", machines, f"--nproc-per-node={place.local_count}"]


def number(name: str, default: int | None = None) -> int:
    """A variable that has to be a number, which it is `default` without. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text} is no number", "environment", "start ranks with torchrun")
    return int(text)


def cores_for_each() -> int | None:
    """Threads of a rank that shares its machine with others: an equal part of the cores. None for a process that has
    the machine for itself, or whose user has set OMP_NUM_THREADS; torchrun sets it to 1 where it is not set."""
    place = read()
    if place.local_count == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // place.local_count)
