"""Sweeps as a person runs them, with jobs that fail in every way: what is printed, what survives, what is equal."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from launcher import launcher
from omegaconf import OmegaConf
from test_conf import loaded
from wandb_server import Server

from gpt.sweeps import callback, jobs
from train import train

# train.py, in which some seeds mean trouble. A person's own script may look like this.
APPLICATION = f"""
import os, signal, sys, threading, time, weakref
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import hydra
import train
import torch
from gpt.config import launch
from gpt.machine import device
from gpt.terminal import console
from gpt.config.schema import TrainConfig

HERE = Path(__file__).parent
alive = []  # weak references to what failed jobs held

class Ballast:
    pass

def kill_after(checkpoint):
    while not checkpoint.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

@hydra.main(version_base="1.3", config_path={str(ROOT / "conf")!r}, config_name="train")
def main(cfg):
    typed = launch.load(cfg, TrainConfig)
    if typed.dry_run:
        return train.train(typed)
    if alive:
        console.say(f"held by failed jobs: {{sum(ballast() is not None for ballast in alive)}}")
    if typed.seed == 13:
        ballast = Ballast()
        alive.append(weakref.ref(ballast))
        raise ValueError("unlucky\\nnumber")
    if typed.seed == 14:
        sys.exit(3)
    if typed.seed == 15:
        with device.memory_errors():
            torch.empty(2**50)
    if typed.seed == 16:
        typed = replace(typed, optimizer=replace(typed.optimizer, lr=1e30))
    if typed.seed == 2 and typed.optimizer.lr == 3e-3 and not (HERE / "killed").exists():
        (HERE / "killed").touch()
        last = Path(typed.out_dir) / "checkpoints" / "step_00000010"
        threading.Thread(target=kill_after, args=[last], daemon=True).start()
    if typed.seed == 4:
        (HERE / "mine" / "experiments" / "mine.yaml").write_text("# @package _global_\\ntrain: {{patience: 30}}\\n")
    return train.train(typed)

launch.launch(main, "train")
"""
SMALL = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=32", "train.tokens_per_step=64",
    "train.max_steps=60", "train.eval_every=20", "train.eval_tokens=256", "train.log_every=5", "train.save_every=5",
    "train.sample_every=null", "data.tokenizer=bytes", "wandb.mode=disabled", "device=cpu",
]  # fmt: skip
RATES = "optimizer.lr=1e-3,3e-3"


@pytest.fixture(scope="module")
def starts():
    with launcher() as running:
        yield running


class Folder:
    """Where an application and its sweeps are."""

    def __init__(self, path):
        self.path = path
        (path / "app.py").write_text(APPLICATION)
        (path / "mine" / "experiments").mkdir(parents=True)
        (path / "mine" / "experiments" / "mine.yaml").write_text("# @package _global_\ntrain: {patience: 70}\n")

    def sweep(self, name):
        return self.path / "sweeps" / name

    def command(self, name, *arguments):
        where = [f"hydra.sweep.dir={self.sweep(name)}", f"data.prepared_dir={self.path / 'data'}"]
        flags = [argument for argument in arguments if argument.startswith("-")]
        return [sys.executable, "app.py", "-m", *flags, *where, *SMALL, *(a for a in arguments if a not in flags)]

    def start(self, name, *arguments):
        env = os.environ | {"COLUMNS": "130", "OMP_NUM_THREADS": "1"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(name, *arguments), cwd=self.path, env=env, **streams)

    def run(self, name, *arguments):
        process = self.start(name, *arguments)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def job(self, name, **settings):
        """The one job of a sweep with these settings, as seed=1, lr=1e-3."""
        wanted = {"lr": "optimizer.lr", "seed": "seed"}
        found = jobs.read(self.sweep(name))
        (job,) = [job for job in found if all(job.config[wanted[key]] == value for key, value in settings.items())]
        return job


def weights(folder):
    return safetensors.torch.load_file(folder / "checkpoints" / "step_00000060" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def status_line(result):
    return next(line for line in result.stdout.splitlines() if re.match(r"\d+ jobs?:", line))


def started(result):
    """How many jobs a start of a sweep has begun."""
    return len(re.findall(r"^job \w{8}: ", result.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def trouble(here):
    """Twelve jobs, of which eight fail in four ways; the process is killed in the middle, the command given again."""
    arguments = ["seed=1,13,14,15,2,16", RATES]
    return here.run("trouble", *arguments), here.run("trouble", *arguments)


@pytest.fixture(scope="module")
def extended(here, trouble):
    """Afterwards a job.json is damaged, and a value is added to an axis."""
    folder = here.job("trouble", seed=1, lr=3e-3).folder
    (folder / "job.json").write_text('{"format": 2, "torn')
    before = {path: path.stat().st_mtime_ns for path in here.sweep("trouble").glob("*/job.json")}
    return here.run("trouble", "seed=1,2,3", RATES), folder, before


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was_and_says_so_first(trouble):
    first, second = trouble
    assert first.returncode == -signal.SIGKILL
    assert status_line(first) == "12 jobs: 12 new"
    step = re.fullmatch(r"12 jobs: 3 done, 1 resumes at step (\d+), 6 failed \(again\), 2 new", status_line(second))
    assert step and 10 <= int(step[1]) <= 60
    assert "resuming from step_000000" in second.stdout
    assert (started(first), started(second)) == (10, 9)
    assert second.returncode == 1


def test_each_failure_stays_with_its_job_and_is_named_with_its_log_at_once_and_at_the_end(here, trouble):
    second = trouble[1]
    reasons = {
        13: (1, r"ValueError: unlucky number", "traceback.txt"),
        14: (3, r"the job called sys\.exit\(3\)", ""),
        15: (5, r"out of memory: .*", ""),
        16: (4, r"training stopped at step \d: loss nan.*", "train.log"),
    }
    for seed, (code, reason, log) in reasons.items():
        for lr in (1e-3, 3e-3):
            job = here.job("trouble", seed=seed, lr=lr)
            assert (job.status, job.code) == ("failed", code)
            assert re.match(reason, job.error)
            assert job.log == str(job.folder / log) and Path(job.log).exists()
            line = f"job {job.id} (seed={seed} optimizer.lr={lr}) failed: {job.error}; log: {job.log}"
            assert (
                second.stdout.splitlines().count(line) == 1 and second.stderr.splitlines().count(f"error: {line}") == 1
            )
    assert len(second.stderr.splitlines()) == 8
    assert "Traceback" not in second.stdout + second.stderr
    assert 'raise ValueError("unlucky' in (here.job("trouble", seed=13, lr=1e-3).folder / "traceback.txt").read_text()


def test_the_table_has_a_line_for_each_setting_best_first_and_files_beside_the_jobs_tell_the_same(here, trouble):
    lines = trouble[1].stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["optimizer.lr"])
    table = [line.split() for line in lines[header : header + 3]]
    assert table[0][:3] == ["optimizer.lr", "status", "val/loss"] and len(table) == 3
    assert [line[1:5] for line in table[1:]] == [["2", "completed,", "4", "failed"]] * 2
    assert lines[-1] == str(here.sweep("trouble"))
    with open(here.sweep("trouble") / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows].count("completed") == 4 and len(rows) == 12
    for name in ("leaderboard.md", "leaderboard.csv", "curves.png", "report.html"):
        assert (here.sweep("trouble") / name).stat().st_size > 200
    assert not list(here.sweep("trouble").rglob("*.new"))


def test_what_failed_jobs_held_is_gone_when_the_next_one_starts(trouble):
    held = re.findall(r"held by failed jobs: (\d+)", trouble[1].stdout)
    assert held and set(held) == {"0"}  # Hydra keeps the exceptions, but not what their frames held


def test_a_job_in_a_sweep_even_one_that_was_killed_equals_the_same_job_alone_bit_for_bit(here, trouble, tmp_path):
    threads = torch.get_num_threads()
    for seed, lr in ((1, 1e-3), (2, 3e-3)):
        inside = here.job("trouble", seed=seed, lr=lr)
        own = [f"data.prepared_dir={here.path / 'data'}", f"seed={seed}", f"optimizer.lr={lr}", "dry_run=false"]
        cfg = loaded(*SMALL, *own)
        alone = tmp_path / f"{seed}"
        train(type(cfg)(**{**vars(cfg), "out_dir": str(alone)}))
        assert same(weights(inside.folder), weights(alone))
    torch.set_num_threads(threads)


@pytest.mark.exhaustive
def test_a_value_more_on_an_axis_adds_jobs_and_disturbs_none(here, extended):
    result, damaged, before = extended
    assert result.returncode == 1  # for the failed ones of before
    assert status_line(result) == "6 jobs: 3 done, 1 resumes at step 60, 2 new; 8 more of this sweep are as they were"
    assert started(result) == 3
    after = {path: path.stat().st_mtime_ns for path in here.sweep("trouble").glob("*/job.json")}
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {damaged / "job.json"} and len(after) == len(before) + 2


def test_a_damaged_job_file_is_one_warning_and_the_job_is_found_finished(here, extended):
    result, damaged, _ = extended
    assert [line for line in result.stderr.splitlines() if "damaged" in line] == [
        f"warning: {damaged / 'job.json'} is damaged; the job is known by its other files"
    ]
    assert "already at step 60 of 60" in result.stdout
    assert here.job("trouble", seed=1, lr=3e-3).status == "completed"


def test_a_killed_job_that_goes_on_by_its_folder_is_recorded_as_completed_unless_its_settings_are_others(
    here, extended
):
    job = here.job("trouble", seed=3, lr=3e-3)
    for typed, status in ([], "completed"), (["sample.top_k=3"], "interrupted"):
        jobs.write(replace(job, status="running"))
        command = [sys.executable, "app.py", f"out_dir={job.folder}", *typed]
        subprocess.run(command, cwd=here.path, capture_output=True, timeout=60, check=True)
        assert jobs.read_one(job.folder).status == status
    jobs.write(job)


@pytest.mark.exhaustive
def test_a_sweep_that_runs_is_reported_on_refused_to_a_second_process_and_ended_by_ctrl_c(here):
    running = here.start("long", "seed=1,3", "train.max_steps=4000")
    end = time.monotonic() + 60
    while not list(here.sweep("long").glob("*/checkpoints/step_00000010")) and time.monotonic() < end:
        time.sleep(0.02)
    report = here.run("long", "report=long")
    second = here.run("long", "seed=1,3", "train.max_steps=4000")
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)

    assert re.search(r"1 +running at [\d,]+ tokens|1 running at", report.stdout) and report.returncode == 1
    assert (here.sweep("long") / "report.html").exists()
    assert second.returncode == 6
    assert re.fullmatch(r"error: sweep long in use by pid \d+ since .*; wait for it, or choose another sweep.name\n",
                        second.stderr)  # fmt: skip
    assert running.returncode == 130
    assert re.search(r"error: interrupted by SIGINT: step_\d+ is saved", stderr) and "Traceback" not in stderr
    first, other = jobs.read(here.sweep("long"))
    assert (first.status, other.status) == ("interrupted", "new")
    assert "2 of 2 jobs are not done; to go on: python " in stdout
    assert (stdout + stderr).count("to go on") == 1  # one way: the sweep's, not that of its job
    again = here.run("long", "seed=1,3", "train.max_steps=4000", "dry_run=true")
    assert again.returncode == 0  # nothing runs, nothing is written
    assert [job.status for job in jobs.read(here.sweep("long"))] == ["interrupted", "new"]


@pytest.mark.exhaustive
def test_successive_halving_stops_the_worst_and_the_best_is_the_same_as_without(here, extended):
    result = here.run("halved", "seed=1,3", "optimizer.lr=1e-3,3e-3,1e-5", "sweep.rungs=[1000,2000]", "sweep.keep=0.5")
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("rung")] == [
        "rung at 1,000 tokens: 4 of 6 jobs go on", "rung at 2,000 tokens: 2 of 4 jobs go on"
    ]  # fmt: skip
    ended = {
        (job.config["optimizer.lr"], job.config["seed"]): (job.status, job.rows[-1]["step"])
        for job in jobs.read(here.sweep("halved"))
    }
    assert ended == {
        (1e-5, 1): ("halved", 20), (1e-5, 3): ("halved", 20), (1e-3, 1): ("halved", 40), (1e-3, 3): ("halved", 40),
        (3e-3, 1): ("completed", 60), (3e-3, 3): ("completed", 60),
    }  # fmt: skip
    assert "halved at 1,2" in result.stdout and "halved at 2,5" in result.stdout
    same_job = [here.job(name, seed=1, lr=3e-3) for name in ("halved", "trouble")]
    assert same_job[0].id == same_job[1].id and same(*(weights(job.folder) for job in same_job))


@pytest.mark.exhaustive
def test_a_file_edited_while_a_sweep_runs_changes_no_job_of_it_and_makes_new_ones_of_the_next(here):
    arguments = [f"--config-dir={here.path / 'mine'}", "experiments=mine", "seed=4,5"]
    assert here.run("edited", *arguments).returncode == 0  # its first job edits the file
    assert [job.config["train.patience"] for job in jobs.read(here.sweep("edited"))] == [70, 70]
    result = here.run("edited", *arguments)
    assert status_line(result) == "2 jobs: 2 new; 2 more of this sweep are as they were"
    assert [job.config["train.patience"] for job in jobs.read(here.sweep("edited"))] == [70, 70, 30, 30]
    assert re.search(r"^train\.patience +status", result.stdout, re.MULTILINE)  # what differs is a column


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["optimizer.lrr=1,2"], "unknown key optimizer.lrr, did you mean optimizer.lr?"),
        (["resume=auto,never"], "the axis resume=auto, resume=never changes nothing; leave it out"),
        (["train.max_tokens=1,2"], "the axis train.max_tokens=1, train.max_tokens=2 changes nothing; leave it out"),
        (["model.context_length=16,512,1024"], "2 of 3 jobs cannot run, so none was started: model.context_length=512: "
         "train.tokens_per_step 64 is less than one row of model.context_length 512; model.context_length=1024: "
         "train.tokens_per_step 64 is less than one row of model.context_length 1024; "),
        (["seed=1,2", "sweep.rungs=[5,3]"], "sweep.rungs=[5, 3]: each number should be larger than the one before"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_one_line_before_anything_starts(here, starts, arguments, error):
    sweep_dir = here.sweep("refused")
    start = starts.start("-m", f"hydra.sweep.dir={sweep_dir}", *SMALL, *arguments)
    assert start.code == 2 and start.stderr.count("\n") == 1 and start.stderr.startswith(f"error: {error}")
    assert not list(sweep_dir.glob("*/*"))


def test_weights_to_begin_with_are_an_axis_though_the_name_of_the_model_comes_of_them(here, starts):
    weights = ",".join(str(ROOT / "tests/golden" / name) for name in ("format_4", "format_5"))
    sweep_dir = here.sweep("weights")
    start = starts.start("-m", f"hydra.sweep.dir={sweep_dir}", f"init.from={weights}", "train.tokens_per_step=64")
    assert (start.code, start.stdout.count("valid")) == (0, 2), start.stderr


def test_a_sweep_has_the_tags_of_all_its_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(callback, "_running", None)
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/train.yaml").wandb, resolve=False)
    jobs_ = [OmegaConf.create({"wandb": values | {"tags": [name, "sample"]}}) for name in ("tiny", "mini")]
    callback._begin(tmp_path, jobs_)
    folder, wandb = callback._running
    assert (folder, wandb.tags) == (tmp_path, ["tiny", "sample", "mini"])


def test_a_single_run_leaves_no_record_of_a_sweep(tmp_path, starts):
    start = starts.start(f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 0 and not list(tmp_path.rglob("job.json"))


def test_no_sweep_runs_in_a_process_that_did_not_start_one():
    assert not callback.running()
    with pytest.raises(RuntimeError):
        callback.close(interrupted=False)


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_directory_in_a_file_of_settings_begins_at_the_project_wherever_the_user_is(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create({"hydra": {kind: {"dir": "it's/here"}, "overrides": {"hydra": []}}})
    OmegaConf.set_readonly(config.hydra, True)  # as Hydra hands it over
    place = callback._settle_place(config, kind)
    assert str(place) == config.hydra[kind].dir == f"{ROOT}/it's/here"
    (override,) = OverridesParser.create().parse_overrides(list(config.hydra.overrides.hydra))
    assert (override.key_or_group, override.value()) == (f"hydra.{kind}.dir", str(place))  # for jobs elsewhere


@pytest.mark.exhaustive
def test_the_same_command_sends_once_what_wandb_lacks_of_finished_jobs_and_nothing_of_a_copied_sweeps(here):
    settings = ["wandb.mode=auto" if text == "wandb.mode=disabled" else text for text in SMALL]

    def start(name, **environment):
        environment = {"WANDB_MODE": "", "WANDB_DIR": str(here.path), "HOME": str(here.path)} | environment
        command = [sys.executable, "app.py", "-m", f"hydra.sweep.dir={here.sweep(name)}", *settings, "seed=1,3"]
        result = subprocess.run(command, cwd=here.path, env=os.environ | environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def known(name):
        files = [here.sweep(name) / "wandb.json", *sorted(here.sweep(name).glob("*/wandb.json"))]
        return [json.loads(file.read_text())["id"] for file in files]

    with Server() as server:
        online = server.environment | {"WANDB_MODE": ""}
        assert start("away", WANDB_API_KEY="").count("to upload") == 3
        shutil.copytree(here.sweep("away"), here.sweep("copy"))
        assert start("away", **online).count("W&B: http") == 2
        assert set(server.runs) == set(known("away"))
        assert "W&B: http" not in start("away", **online)
        assert "copied from" in start("copy", **online)
        (new,) = known("copy")
        assert set(server.runs) == {new, *known("away")} and new not in known("away")


def test_a_sweep_of_another_version_is_refused_and_untouched(here, tmp_path):
    folder = here.sweep("old") / "0"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"num": 0, "overrides": ["lr=1"], "status": "completed"}))
    result = here.run("old", "seed=1,2")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: the sweep is of another version: format 1 != 2 ({folder / 'job.json'}); its files are untouched; "
        "choose another sweep.name\n"
    )
    assert sorted(path.name for path in here.sweep("old").iterdir()) == [".lock", "0"]


@pytest.mark.exhaustive
def test_jobs_of_an_older_version_are_recognised_in_their_folders(tmp_path):
    """tests/golden/sweep_format_2 is of the version before model.family, and before text and the constant schedule lost
    the keys that they did not use: two jobs done, one failed, and one killed behind its checkpoint of step 100."""
    golden = ROOT / "tests" / "golden" / "sweep_format_2"
    sweep = tmp_path / "sweep_format_2"
    shutil.copytree(golden / "sweep", sweep)
    settings = [
        "data=text", "data.path=golden/sweep_format_2/text.txt", "data.tokenizer=bytes",
        "data.prepared_dir=../outputs/data/sweep_format_2", "model.n_layer=1", "model.n_head=1", "model.n_embd=8",
        "model.context_length=16", "schedule=constant", "device=cpu", "train.dtype=float32", "train.compile=false",
        "train.tokens_per_step=32", "train.micro_batch=2", "train.max_steps=200", "train.eval_every=100",
        "train.eval_tokens=64", "train.log_every=100", "train.sample_every=null", "train.save_every=100",
        "train.keep_checkpoints=1", "wandb.mode=disabled",
    ]  # fmt: skip
    before = {job.name: job for job in jobs.read(sweep)}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", "optimizer.lr=1e-3,3e-4,1e-2", *settings,
         f"hydra.sweep.dir={sweep}"],
        capture_output=True, text=True, cwd=ROOT / "tests", timeout=120,
    )  # fmt: skip
    assert "3 jobs: 2 done, 1 resumes at step 100; 1 more of this sweep are as they were" in result.stdout, result
    after = {job.name: job for job in jobs.read(sweep)}
    assert {name: job.id for name, job in after.items()} == {name: job.id for name, job in before.items()}
    assert [path.name for path in sweep.glob("*/checkpoints")] == ["checkpoints"]  # the others have trained nothing
    killed = after["optimizer.lr=0.01"]
    assert killed.status == "completed" and killed.val_loss == pytest.approx(
        1.707957, abs=1e-4
    )  # as that version ended
    assert jobs.varied_keys(list(after.values())) == ["optimizer.lr"]
