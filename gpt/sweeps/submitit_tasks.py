"""Makes the tasks of a submitit job one group of ranks, and has them save before the job goes back into the queue.

hydra/launcher=submitit_slurm with tasks_per_node or nodes starts the same job in all tasks of an allocation. Before
SLURM takes it away, it sends a signal to all tasks; submitit would stop the first one wherever it is, and queue the job
again. Here the signal ends the run as SIGTERM does, at the same step in all ranks, and then submitit gets its turn.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

from gpt.machine import rank_environment
from gpt.runs import interrupt

_queue_again: Callable[[int, FrameType | None], None] | None = None  # what submitit does when the signal has come
_received: int | None = None  # the signal


def prepare() -> None:
    """Prepares this process, which is a task of a submitit job, for the job's run."""
    import submitit  # here, because only those have it who use it

    global _queue_again
    task = submitit.JobEnvironment()
    if task.num_tasks > 1:  # one task is a run of one process
        os.environ.setdefault("MASTER_PORT", str(rank_environment.port_of_job()))  # submitit's may be taken
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ.setdefault("OMP_NUM_THREADS", cores)
    number = getattr(signal, f"SIG{task.USR_SIG}")
    _queue_again = signal.getsignal(number)
    signal.signal(number, _save_first)


def queue_again() -> None:
    """Puts the job, which has saved where it is, back into the queue if that is why it has ended; ends the process."""
    if _received is not None and _queue_again is not None:
        _queue_again(_received, None)


def _save_first(number: int, frame: FrameType | None) -> None:
    global _received
    run = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    has_been_ended = _received is not None or (isinstance(run, interrupt.Stop) and run.signal is not None)
    _received = number
    if not has_been_ended:  # a second SIGTERM would end it before it has saved
        signal.raise_signal(signal.SIGTERM)
