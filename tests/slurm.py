#!/usr/bin/env python3
"""As much of SLURM as submitit calls, on this machine: sbatch, srun, scontrol, sacct, by the name it is called by.

`install` puts them into a folder for PATH. State is in files beside them: `batch` is the last script, `step-<job>` the
processes of a job's tasks, `queued-<job>` and `ended-<job>` what has become of it, `errors` what the script says.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TextIO

COMMANDS = ("sbatch", "srun", "scontrol", "sacct")
FIRST_JOB = 4000
HERE = Path(__file__).parent


def install(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        (folder / name).write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        (folder / name).chmod(0o755)
    return folder


def sbatch(arguments: list[str]) -> None:
    """Runs a script once, or as an array, each time again that it is put back into the queue."""
    text = Path(arguments[0]).read_text()
    (HERE / "batch").write_text(text)
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", text))
    last = re.match(r"0-(\d+)", options.get("array", ""))
    errors = open(HERE / "errors", "a")  # noqa: SIM115
    for index in range(int(last[1]) + 1 if last else 1):
        tasks = int(options.get("ntasks-per-node", 1)) * int(options.get("nodes", 1))
        name = f"{FIRST_JOB}_{index}" if last else str(FIRST_JOB)
        variables = {
            "SLURM_JOB_ID": str(FIRST_JOB + index), "SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": options.get("nodes", "1"), "NAME": name,
        }  # fmt: skip
        if last:
            variables |= {"SLURM_ARRAY_JOB_ID": str(FIRST_JOB), "SLURM_ARRAY_TASK_ID": str(index)}
        loop = f'while bash "{arguments[0]}"; [ -e "{HERE}/queued-{name}" ]; do rm "{HERE}/queued-{name}"; done'
        command = ["bash", "-c", f'{loop}; touch "{HERE}/ended-{name}"']
        subprocess.Popen(
            command, env=os.environ | variables, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors
        )
    print(f"Submitted batch job {FIRST_JOB}")


def srun(arguments: list[str]) -> None:
    """Starts all tasks, waits for them, and returns the largest of their exit codes."""
    places = {arguments[i]: arguments[i + 1] for i in range(len(arguments)) if arguments[i] in ("--output", "--error")}
    command = arguments[max(i for i, text in enumerate(arguments) if text in places) + 2 :]
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        values = {"%j": os.environ["SLURM_JOB_ID"], "%A": str(FIRST_JOB), "%t": str(rank)}
        values["%a"] = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
        out, err = (append(places[key], values) for key in ("--output", "--error"))
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        tasks.append(subprocess.Popen(command, env=os.environ | place, stdout=out, stderr=err))
    (HERE / f"step-{os.environ['NAME']}").write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max(abs(task.wait()) for task in tasks))


def append(pattern: str, values: dict[str, str]) -> TextIO:
    return open(re.sub("%[jAat]", lambda match: values[match[0]], pattern), "a", encoding="utf-8")


def scontrol(arguments: list[str]) -> None:
    (HERE / f"queued-{arguments[1]}").touch()


def sacct(arguments: list[str]) -> None:
    print("JobID|State|NodeList")
    for path in HERE.glob("step-*"):
        name = path.name.partition("-")[2]
        print(f"{name}|{'COMPLETED' if (HERE / f'ended-{name}').exists() else 'RUNNING'}|localhost")


if __name__ == "__main__":
    globals()[Path(__file__).name](sys.argv[1:])
