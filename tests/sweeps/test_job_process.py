"""One job in the processes that torchrun has started: which process it is for, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gpt.sweeps import job_process
from gpt.sweeps.job_process import Fault


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1,2"], ["seed=1", "--job", "x"], ["--job"]])
def test_any_other_command_line_is_no_job(arguments):
    assert job_process.received(arguments) is None


def test_the_file_of_a_job_comes_after_its_flag():
    assert job_process.received(["--job", "/tmp/x/job"]) == Path("/tmp/x/job")


def test_the_fault_that_came_first_is_the_cause_of_the_others(tmp_path):
    assert job_process.first_fault(tmp_path) is None
    for number, time in enumerate((30, 10, 20)):
        note = tmp_path / f"fault-{number}.json"
        note.write_text(json.dumps({"error": f"process {number}", "code": number + 2}))
        os.utime(note, (time, time))
    assert job_process.first_fault(tmp_path) == Fault("process 1", 3)


PROGRAM = r"""
import json, os, sys
from pathlib import Path
import gpt.config.launch
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from gpt.errors import Interrupted, UserError
from gpt.sweeps import job_process, jobs, workers

folder = Path(sys.argv[1])
with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
    loader = GlobalHydra.instance().config_loader()
overrides = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={folder}/sweep"]
config = loader.load_configuration("train", overrides, RunMode.MULTIRUN)
workers._is_worker = True  # as in a process of its own

def run(rank, error=None):
    def task(cfg):
        seeds.append(cfg.seed)
        if error:
            raise error

    (folder / "sweep" / "one" / "job.json").unlink(missing_ok=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    code = job_process.run(task, folder / "job")
    job = jobs.load(folder / "sweep" / "one")
    fault = job_process.first_fault(folder)
    return [code, job and job.status, job and job.error, fault and fault.error]

seeds = []
job = loader.load_sweep_config(config, ["seed=7", "hydra.sweep.subdir=one"])
job.hydra.job.id = job.hydra.job.num = 0
(folder / "job").write_bytes(job_process.packed(HydraContext(loader, Callbacks(job)), job))
answers = [run(1), run(0), run(1, ValueError("a bug")), run(1), run(0, UserError("no", code=5))]
answers.append(run(0, Interrupted(15)))
print(json.dumps([answers, seeds]))
"""


@pytest.mark.exhaustive
def test_the_first_process_of_a_group_records_the_job_and_every_one_notes_what_has_ended_it(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr
    answers, seeds = json.loads(result.stdout.splitlines()[-1])
    assert answers == [
        [0, None, None, None],
        [0, "completed", None, None],
        [1, None, None, "ValueError: a bug"],
        [0, None, None, None],  # what was noted before a restart is gone
        [5, "failed", "no", "no"],
        [143, "interrupted", None, None],
    ]
    assert seeds == [7] * 6 and "\nValueError: a bug" in result.stderr
