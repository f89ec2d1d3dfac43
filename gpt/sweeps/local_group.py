"""Runs the processes of one job on this machine: torchrun starts them, waits for them, and ends all when one dies."""

import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from gpt.files.paths import PROJECT_ROOT
from gpt.sweeps import job_process
from gpt.sweeps.job_process import Fault

# Of an outer group, if there is one: torchrun sets its own.
OUTER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Shape:
    """How many processes a job gets, and what each may use."""

    n_processes: int
    max_restarts: int  # of all of them, after one has died
    variables: dict[str, str]  # of their environment, beside those of this process


@dataclass(frozen=True)
class Outcome:
    """How a group has ended."""

    code: int  # of torchrun: 0 if all processes ended with 0, else 1
    fault: Fault | None  # that one of its processes has noted before the others did


class LocalGroup:
    """The processes of one job. `run` and `end` are called by different threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ending = False
        self._starting = threading.Lock()  # so that the process gets the signal to end, or is not started

    def run(self, job: bytes, shape: Shape, log: Path) -> Outcome | None:
        """Runs a job, as `job_process.packed` makes it, to its end. None: `end` came before it was started.

        What torchrun and the libraries below it write to stderr is in `log`; the job's own lines are in its train.log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gpt-lab-") as folder, open(log, "wb") as stderr:  # for this user alone
            path = Path(folder) / "job"
            path.write_bytes(job)
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={shape.n_processes}",
                f"--max-restarts={shape.max_restarts}", str(PROJECT_ROOT / "train.py"), job_process.FLAG, str(path),
            ]  # fmt: skip
            environment = {name: value for name, value in os.environ.items() if name not in OUTER} | shape.variables
            with self._starting:
                if self._is_ending:
                    return None
                self._process = subprocess.Popen(command, env=environment, stderr=stderr)
            return Outcome(self._process.wait(), job_process.first_fault(Path(folder)))

    def end(self) -> None:
        """Asks all processes to save where they are and to end."""
        with self._starting:
            self._is_ending = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()  # which torchrun passes on
