"""Launches each job of a sweep as a process group of this machine: conf/hydra/launcher/torchrun.yaml."""

import os

from gpt.errors import UserError
from gpt.sweeps import workers
from gpt.sweeps.group_launcher import GroupLauncher
from gpt.sweeps.local_group import LocalGroup, Shape


class TorchrunLauncher(GroupLauncher):
    """Runs jobs as groups of `nproc_per_node` processes, `n_jobs` groups at once."""

    def __init__(self, nproc_per_node: int, n_jobs: int | None, max_restarts: int) -> None:
        self._n_processes, self._n_jobs, self._max_restarts = nproc_per_node, n_jobs, max_restarts

    def shapes(self, n_jobs: int) -> list[Shape]:
        """Each group gets GPUs of its own or, where there are none, its share of the cores."""
        each, gpus = self._n_processes, [] if self._config.device == "cpu" else visible_gpus()
        if not gpus:
            at_once = self._n_jobs or 1
            threads = os.environ.get("OMP_NUM_THREADS", workers.threads_each(at_once * each, n_jobs * each))
            return [self._shape(OMP_NUM_THREADS=str(threads))] * at_once
        at_once = self._n_jobs or max(1, len(gpus) // each)
        if at_once * each > len(gpus):
            what = f"hydra.launcher: n_jobs {at_once} x nproc_per_node {each} is more than {len(gpus)} GPUs"
            raise UserError(what, remedy="lower one of them, or set device=cpu")
        return [self._shape(CUDA_VISIBLE_DEVICES=",".join(gpus[i * each : (i + 1) * each])) for i in range(at_once)]

    def open(self, shape: Shape) -> LocalGroup:
        return LocalGroup()

    def _shape(self, **variables: str) -> Shape:
        return Shape(self._n_processes, self._max_restarts, variables)


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # here, as a word on a wrong command line does not wait for it

    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]
