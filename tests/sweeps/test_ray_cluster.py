"""hydra/launcher=ray: jobs as process groups on the machines of a Ray cluster, here one of two cores."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from gpt.errors import UserError
from gpt.sweeps import jobs
from gpt.sweeps.local_group import Shape
from gpt.sweeps.ray_cluster import RayLauncher

ray = pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
pytestmark = pytest.mark.exhaustive  # a cluster takes seconds to start

LAUNCHER = {
    "address": None, "nproc_per_node": 1, "cpus_per_process": 1, "gpus_per_process": 0, "n_jobs": None,
    "max_restarts": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two cores."""
    variables = {"PYTHONPATH": str(ROOT)}
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.mark.parametrize(
    ("changes", "at_once"),
    [({}, 2), ({"nproc_per_node": 2}, 1), ({"cpus_per_process": 2}, 1), ({"n_jobs": 1}, 1), ({"n_jobs": 5}, 5)],
)
def test_as_many_groups_run_at_once_as_the_cluster_has_room_for(cluster, changes, at_once, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    values = LAUNCHER | changes
    variables = {"OMP_NUM_THREADS": str(values["cpus_per_process"])}
    assert RayLauncher(**values).shapes(9) == [Shape(values["nproc_per_node"], 0, variables)] * at_once


@pytest.mark.parametrize("changes", [{"nproc_per_node": 3}, {"gpus_per_process": 1}])
def test_a_job_for_which_no_machine_has_room_is_refused_before_it_waits_for_ever(cluster, changes):
    with pytest.raises(UserError, match="no machine of the cluster has"):
        RayLauncher(**LAUNCHER | changes).shapes(9)


SMALL = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "data.tokenizer=bytes",
    "train.tokens_per_step=128", "train.eval_every=1000", "train.eval_tokens=256", "train.sample_every=null",
    "device=cpu", "wandb.mode=disabled",
]  # fmt: skip


def train(folder, *arguments):
    """A start of train.py."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, f"data.prepared_dir={folder}/data", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def start(cluster, folder, *arguments):
    """A sweep of two seeds on the cluster."""
    launcher = ("hydra/launcher=ray", f"hydra.launcher.address={cluster}")
    return train(folder, "-m", f"hydra.sweep.dir={folder}/sweep", *launcher, "seed=1,2", *arguments)


def test_a_signal_ends_the_groups_of_a_cluster_with_checkpoints_and_the_same_command_goes_on(cluster, tmp_path):
    with start(cluster, tmp_path, "train.max_steps=3000", "train.save_every=100000") as process:
        wait(lambda: sum(len(job.rows) > 3 for job in jobs.read(tmp_path / "sweep")) >= 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 130 and "to go on: python" in out, (out, err)
    found = jobs.read(tmp_path / "sweep")
    assert "interrupted" in [job.status for job in found] and "running" not in [job.status for job in found]
    assert any(list((job.folder / "checkpoints").glob("step_*")) for job in found)
    with start(cluster, tmp_path, "train.max_steps=3000", "train.save_every=100000") as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0 and "resume" in out.splitlines()[0], (out, err)
    assert [job.status for job in jobs.read(tmp_path / "sweep")] == ["completed"] * 2


@pytest.fixture(scope="module")
def ended(cluster, tmp_path_factory):
    """A sweep of which two jobs fail: its folder, exit code, stdout and stderr."""
    folder = tmp_path_factory.mktemp("ended")
    with start(cluster, folder, "train.max_steps=4", "optimizer.lr=1e-3,1e9") as process:
        out, err = process.communicate(timeout=400)
    return folder, process.returncode, out, err


def test_a_job_that_fails_on_a_cluster_leaves_the_others_alone(ended):
    folder, code, out, err = ended
    assert code == 1, (out, err)
    found = jobs.read(folder / "sweep")
    assert sorted(job.status for job in found) == ["completed", "completed", "failed", "failed"]
    assert [job.code for job in found if job.status == "failed"] == [4, 4] and err.count("error: job ") == 2


def test_the_leaderboard_has_the_jobs_of_a_cluster_and_those_that_are_done_are_not_run_again(cluster, ended):
    folder, *_ = ended
    with open(folder / "sweep" / "leaderboard.csv", newline="") as file:
        rows = [(float(row["optimizer.lr"]), row["status"], row["seeds"]) for row in csv.DictReader(file)]
    assert rows == [(1e-3, "completed", "2"), (1e9, "failed", "2")]
    before = [job for job in jobs.read(folder / "sweep") if job.status == "completed"]
    with start(cluster, folder, "train.max_steps=4", "optimizer.lr=1e-3") as process:
        out, err = process.communicate(timeout=400)
    assert out.startswith("2 jobs: 2 done; 2 more of this sweep are as they were\n"), (out, err)
    assert [job for job in jobs.read(folder / "sweep") if job.status == "completed"] == before


def test_a_job_on_a_cluster_equals_the_same_job_alone_bit_for_bit(ended, tmp_path):
    folder, *_ = ended
    [job] = [job for job in jobs.read(folder / "sweep") if job.status == "completed" and job.config["seed"] == 2]
    with train(folder, f"out_dir={tmp_path}/alone", "train.max_steps=4", "optimizer.lr=1e-3", "seed=2") as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, (out, err)
    last = Path("checkpoints", "step_00000004", "model.safetensors")
    assert (job.folder / last).read_bytes() == (tmp_path / "alone" / last).read_bytes()


def wait(condition):
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
