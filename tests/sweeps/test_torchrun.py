"""hydra/launcher=torchrun: what each group gets of this machine."""

import os

import pytest
import torch
from omegaconf import OmegaConf

from gpt.errors import UserError
from gpt.sweeps.torchrun import TorchrunLauncher, visible_gpus


def variables(device="auto", n_jobs=None, each=2, jobs=9):
    launcher = TorchrunLauncher(nproc_per_node=each, n_jobs=n_jobs, max_restarts=3)
    launcher.setup(hydra_context=None, task_function=None, config=OmegaConf.create({"device": device}))
    shapes = launcher.shapes(jobs)
    assert {(shape.n_processes, shape.max_restarts) for shape in shapes} == {(each, 3)}
    return [shape.variables for shape in shapes]


@pytest.fixture
def machine(monkeypatch):
    """16 cores and so many GPUs."""

    def make(n_gpus, visible=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


def test_without_gpus_the_groups_share_out_the_cores(machine, monkeypatch):
    machine(0)
    assert variables() == [{"OMP_NUM_THREADS": "8"}]
    assert variables(n_jobs=3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert variables(n_jobs=3, jobs=1) == [{"OMP_NUM_THREADS": "8"}] * 3  # two of them have nothing to do
    assert variables(n_jobs=16) == [{"OMP_NUM_THREADS": "1"}] * 16
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # a person knows better
    assert variables() == [{"OMP_NUM_THREADS": "5"}]


def test_each_group_has_gpus_of_its_own(machine):
    machine(5)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables()] == ["0,1", "2,3"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables(n_jobs=1, each=4)] == ["0,1,2,3"]
    assert variables(device="cpu") == [{"OMP_NUM_THREADS": "8"}]


def test_gpus_that_this_process_may_not_use_are_not_given_away(machine):
    machine(3, visible="7,GPU-8f2a,2")
    assert visible_gpus() == ["7", "GPU-8f2a", "2"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables()] == ["7,GPU-8f2a"]


@pytest.mark.parametrize(("n_jobs", "each"), [(None, 4), (2, 2)])
def test_more_processes_than_gpus_are_refused(machine, n_jobs, each):
    machine(3)
    with pytest.raises(UserError) as caught:
        variables(n_jobs=n_jobs, each=each)
    assert caught.value.what == f"hydra.launcher: n_jobs {n_jobs or 1} x nproc_per_node {each} is more than 3 GPUs"
