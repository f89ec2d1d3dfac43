"""The tasks of a submitit job: ranks of one group, which save before the job goes back into the queue."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import slurm
from conftest import ROOT

from gpt.sweeps import jobs

pytest.importorskip("submitit", reason="requirements-sweeps.txt is not installed")

PROGRAM = """
import json, os, signal, sys
from gpt.runs import interrupt
from gpt.sweeps import submitit_tasks

def queue_again(number, frame):
    order.append(number)

order = []
signal.signal(signal.SIGTERM, lambda number, frame: order.append(number))
signal.signal(signal.SIGUSR2, queue_again)  # as submitit does
submitit_tasks.prepare()
submitit_tasks.queue_again()  # nothing has come
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
place = [os.environ.get(name) for name in names]
with interrupt.deferred() as stop:
    for number in map(int, sys.argv[1:]):
        os.kill(os.getpid(), number)
submitit_tasks.queue_again()
print(json.dumps([place, stop.signal, order]))
"""
TASK = {
    "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_CPUS_PER_TASK": "6",
}  # fmt: skip


def task(*signals, **variables):
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(int(number)) for number in signals)],
        capture_output=True, text=True, cwd=ROOT, timeout=60, env=inherited | TASK | variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_tasks_on_several_machines_are_one_group_that_meets_on_the_first():
    assert task() == [["3", "4", "1", "2", "gpu07", "20007", "6"], None, []]
    assert task(MASTER_PORT="29500")[0][5] == "29500"


def test_one_task_is_a_run_of_one_process():
    assert task(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0")[0] == [None] * 7


@pytest.mark.parametrize(
    ("signals", "order"),
    [
        ([signal.SIGUSR2], [signal.SIGUSR2]),
        ([signal.SIGUSR2, signal.SIGUSR2], [signal.SIGUSR2]),
        ([signal.SIGTERM, signal.SIGUSR2], [signal.SIGUSR2]),
        ([signal.SIGTERM], []),  # scancel: the job does not come back
    ],
)
def test_the_run_ends_first_and_then_the_job_goes_back_into_the_queue(signals, order):
    assert task(*signals)[1:] == [signal.SIGTERM, order]


SMALL = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "data.tokenizer=bytes",
    "train.tokens_per_step=128", "train.eval_every=1000", "train.eval_tokens=256", "train.save_every=100000",
    "train.sample_every=null", "device=cpu", "wandb.mode=disabled", "hydra.launcher.tasks_per_node=2",
]  # fmt: skip


@pytest.mark.exhaustive
def test_jobs_of_two_tasks_that_are_preempted_go_on_where_they_were(tmp_path):
    path = slurm.install(tmp_path / "slurm")
    command = [
        sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu",
        "seed=1,2", "train.max_steps=1200", *SMALL, f"data.prepared_dir={tmp_path}/data",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    variables = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=os.environ | variables, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        wait(lambda: any(len(job.rows) > 3 for job in jobs.read(tmp_path / "sweep")))
        running = next(job for job in jobs.read(tmp_path / "sweep") if len(job.rows) > 3)
        for pid in (path / f"step-{slurm.FIRST_JOB}_{running.number}").read_text().split():
            os.kill(int(pid), signal.SIGUSR2)  # as SLURM does, to all tasks
        process.communicate(timeout=500)
    assert process.returncode == 0
    text = (running.folder / "train.log").read_text()
    assert text.count("resuming from step_") == 1 and "newest valid of 1" in text
    assert [job.status for job in jobs.read(tmp_path / "sweep")] == ["completed"] * 2
    script = (path / "batch").read_text()
    lines = ("--array=0-1%2", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=1", "--signal=USR2@120")
    assert all(f"#SBATCH {line}\n" in script for line in lines), script


def wait(condition):
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
