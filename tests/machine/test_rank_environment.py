"""Which rank of how many a process is, as torchrun and SLURM say it."""

import os

import pytest

from gpt.errors import UserError
from gpt.machine import rank_environment
from gpt.machine.rank_environment import RankEnvironment

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM_", "TORCHELASTIC_", "OMP_NUM_THREADS")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "7",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "10042",
}


@pytest.fixture
def found(monkeypatch):
    """What is read from an environment that says nothing else of ranks."""
    for name in list(os.environ):
        if name.startswith(OURS):
            monkeypatch.delenv(name)

    def read(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return rank_environment.read()

    return read


def test_a_process_that_was_started_alone_is_the_only_rank(found):
    assert found() == RankEnvironment() and found().is_first and found().count == 1
    assert found(WORLD_SIZE="1").count == 1


def test_torchrun_numbers_ranks_machines_and_restarts(found):
    place = found(**TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="2")
    assert place == RankEnvironment(5, 8, 1, 4, "a", 7, has_agent=True, attempt=2) and not place.is_first


def test_tasks_of_slurm_are_ranks_once_their_script_has_exported_an_address(found):
    assert found(**SLURM).count == 1
    assert found(MASTER_ADDR="node1") == RankEnvironment(3, 4, 1, 2, "node1", 20_042)
    assert found(MASTER_PORT="29500").port == 29_500


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_lacks_something_is_an_error_that_names_it(found, name):
    with pytest.raises(UserError, match=f"WORLD_SIZE=8 without {name}"):
        found(**{key: value for key, value in TORCHRUN.items() if key != name})


def test_what_is_no_number_is_an_error(found):
    with pytest.raises(UserError, match="WORLD_SIZE=two is no number"):
        found(**TORCHRUN | {"WORLD_SIZE": "two"})


def test_a_command_that_goes_on_starts_as_many_ranks_as_there_are(found):
    assert rank_environment.is_first() and rank_environment.command() == ["python"]
    found(**TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="True")
    assert rank_environment.command() == ["torchrun", "--nnodes=2", "--nproc-per-node=4"]
    found(WORLD_SIZE="4", RANK="0")
    assert rank_environment.command() == ["torchrun", "--standalone", "--nproc-per-node=4"]
    assert rank_environment.is_first()


def test_one_process_is_warned_that_it_shares_nothing_where_that_was_typed(found, caplog):
    found()
    rank_environment.warn_alone("auto")
    assert not caplog.text
    rank_environment.warn_alone("fsdp")
    assert "parallel=fsdp: there is one process" in caplog.text and "torchrun --standalone --nproc" in caplog.text
    caplog.clear()
    found(**TORCHRUN)
    rank_environment.warn_alone("fsdp")
    assert not caplog.text


def test_a_rank_whose_environment_is_incomplete_is_known_by_its_number(found):
    with pytest.raises(UserError):
        found(RANK="0", WORLD_SIZE="8")
    assert rank_environment.is_first()


def test_ranks_of_a_machine_share_its_cores_unless_their_user_says_otherwise(found, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(10), raising=False)
    found()
    assert rank_environment.cores_for_each() is None
    found(**TORCHRUN)
    assert rank_environment.cores_for_each() == 2
    found(OMP_NUM_THREADS="1")  # as torchrun sets it
    assert rank_environment.cores_for_each() == 2
    found(OMP_NUM_THREADS="3")
    assert rank_environment.cores_for_each() is None
