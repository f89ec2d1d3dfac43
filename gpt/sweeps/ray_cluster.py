"""Launches each job of a sweep as a process group on a machine of a Ray cluster: conf/hydra/launcher/ray.yaml.

Ray finds the machine and keeps its cores and GPUs for the job; torchrun starts the processes there, as on this machine.
(hydra-ray-launcher would run a job in a process of Ray's own, which SIGTERM ends without a checkpoint, and it needs
cloudpickle < 3 where joblib needs 3.)
"""

import os
from pathlib import Path
from typing import Any

from gpt.errors import ENVIRONMENT, UserError, one_line
from gpt.sweeps.group_launcher import GroupLauncher
from gpt.sweeps.local_group import LocalGroup, Outcome, Shape


class RemoteGroup:
    """A LocalGroup in an actor, which is a process of Ray's on the machine that has room for the job."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def run(self, job: bytes, shape: Shape, log: Path) -> Outcome | None:
        """As that of LocalGroup; an outcome without a fault where the machine is lost."""
        import ray

        try:
            return ray.get(self._actor.run.remote(job, shape, log))
        except ray.exceptions.RayActorError:
            return Outcome(1, None)
        finally:
            ray.kill(self._actor)  # which gives back what was kept for it

    def end(self) -> None:
        self._actor.end.remote()


class RayLauncher(GroupLauncher):
    """Runs jobs as groups of `nproc_per_node` processes, `n_jobs` groups at once."""

    def __init__(
        self, address: str | None, nproc_per_node: int, cpus_per_process: int, gpus_per_process: int,
        n_jobs: int | None, max_restarts: int,
    ) -> None:  # fmt: skip
        self._address, self._n_processes, self._n_jobs = address, nproc_per_node, n_jobs
        self._cpus, self._gpus, self._max_restarts = cpus_per_process, gpus_per_process, max_restarts

    def shapes(self, n_jobs: int) -> list[Shape]:
        """As many as the cluster has room for at this moment, or `n_jobs`: Ray lets the others wait, and adds machines
        where it may. Raises UserError where Ray cannot be reached or no machine has room for one job."""
        import ray

        if not ray.is_initialized():
            variables = {"PYTHONPATH": os.environ["PYTHONPATH"]}  # with this project, see workers.launching
            try:
                ray.init(
                    self._address, runtime_env={"env_vars": variables}, log_to_driver=False, include_dashboard=False,
                    logging_level="ERROR",
                )  # fmt: skip
            except Exception as error:  # which is what Ray raises when its own processes do not come up
                what = f"hydra/launcher=ray: {one_line(error, 200)}"
                raise UserError(what, self._address or "", "see hydra.launcher.address", ENVIRONMENT) from error
        needed = self._needed()
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(m.get(name, 0) // n) for name, n in needed.items() if n) for m in machines)
        if not room and self._n_jobs is None:
            text = " and ".join(f"{n} {name}s" for name, n in needed.items())
            raise UserError(
                f"hydra/launcher=ray: no machine of the cluster has {text}", remedy="lower the launcher's keys"
            )
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._cpus))}
        at_once = min(self._n_jobs or room, n_jobs)
        return [Shape(self._n_processes, self._max_restarts, variables)] * at_once

    def open(self, shape: Shape) -> RemoteGroup:
        import ray

        needed = self._needed()
        # Two threads: one waits for the processes, the other may have to end them.
        options = {"num_cpus": needed["CPU"], "num_gpus": needed["GPU"], "max_concurrency": 2}
        return RemoteGroup(ray.remote(LocalGroup).options(**options).remote())

    def _needed(self) -> dict[str, int]:
        """By a job, in Ray's words."""
        return {"CPU": self._n_processes * self._cpus, "GPU": self._n_processes * self._gpus}
