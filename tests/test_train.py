"""train.py as its user runs it: from another directory, resumed, in a sweep, with mistakes."""

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import NO_SOAP, ROOT, THE_VERDICT
from test_conf import loaded

from gpt.errors import UserError
from gpt.files import directory
from gpt.files.jsonl import read_rows
from gpt.runs import checkpoint
from gpt.sweeps import jobs
from train import train

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "train.tokens_per_step=128",
    "train.max_steps=4", "train.eval_every=2", "train.eval_tokens=256", "train.log_every=1", "train.save_every=2",
    "train.sample_every=4", "sample.max_new_tokens=4", "device=cpu",
]  # fmt: skip
TIMING = {"tokens_per_second", "memory_gb"}


def run(script, *arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=120, env=ENVIRONMENT | environment,
    )  # fmt: skip


def settings(tmp_path, *changes):
    """A configuration for `train` called in this process."""
    cfg = loaded(*SMALL, "wandb.mode=disabled", f"data.prepared_dir={tmp_path / 'data'}", *changes)
    return cfg


def in_directory(cfg, path):
    path.mkdir(exist_ok=True)
    return type(cfg)(**{**vars(cfg), "out_dir": str(path)})


def final_weights(run_dir):
    return safetensors.torch.load_file(run_dir / "checkpoints" / "step_00000004" / "model.safetensors")


def rows(run_dir):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_rows(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """prepare_data.py, train.py, train.py again and generate.py, one after the other, from another directory."""
    tmp_path = tmp_path_factory.mktemp("workflow")
    run_dir, data = tmp_path / "run", f"data.prepared_dir={tmp_path / 'data'}"
    elsewhere = {"cwd": tmp_path, "WANDB_DIR": str(tmp_path / "wandb")}
    results = {
        "prepare": run("prepare_data.py", data, **elsewhere),
        "train": run("train.py", *SMALL, data, f"out_dir={run_dir}", **elsewhere),
        "again": run("train.py", *SMALL, data, f"out_dir={run_dir}", **elsewhere),
        "generate": run(
            "generate.py", f"checkpoint={run_dir}", "prompt=What causes Gout ?", "max_new_tokens=5", **elsewhere
        ),
    }
    return run_dir, results


def test_each_command_succeeds_and_prints_no_traceback(workflow):
    for result in workflow[1].values():
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stdout + result.stderr


def test_a_run_leaves_its_configuration_metrics_samples_figure_card_checkpoints_and_model(workflow):
    run_dir, _ = workflow
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "README.md", "checkpoints", "last_model.pt",
        "train.log", "wandb.json",
    }  # fmt: skip
    assert [row["step"] for row in rows(run_dir)] == [0, 1, 2, 3, 4]
    assert {"train/loss", "val/loss", "val/bpb", "val/perplexity", "lr", "grad_norm", "tokens"} <= rows(run_dir)[
        -1
    ].keys()
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_line_is_the_run_directory(workflow):
    run_dir, results = workflow
    assert results["train"].stdout.splitlines()[-1] == str(run_dir)


def test_prepared_data_is_used_and_a_finished_run_is_not_trained_again(workflow):
    _, results = workflow
    assert "preparing" not in results["train"].stdout
    assert "resuming from step_00000004" in results["again"].stdout
    assert "already at step 4 of 4" in results["again"].stdout


def test_train_prepares_what_is_missing_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "gpt")
    train(in_directory(settings(tmp_path, "train.max_steps=1"), tmp_path / "run"))
    assert "preparing data=sample" in caplog.text
    assert list((tmp_path / "data").glob("*/train.bin"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("uninterrupted")
    cfg = settings(tmp_path, "model.dropout=0.1")
    return cfg, train(in_directory(cfg, tmp_path / "run")), tmp_path / "run"


def test_a_run_that_was_killed_goes_on_to_the_same_weights_and_rows(uninterrupted, tmp_path):
    cfg, best, straight = uninterrupted
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")  # killed after the row, before the checkpoint
    assert train(in_directory(cfg, tmp_path / "run")) == best
    assert rows(tmp_path / "run") == rows(straight)
    for name, tensor in final_weights(straight).items():
        assert torch.equal(tensor, final_weights(tmp_path / "run")[name]), name


@pytest.mark.parametrize(
    "knob",
    ["train.sample_every=1", "train.save_every=1", "train.eval_every=1", "train.log_every=3", "wandb.mode=offline"],
)
def test_watching_a_run_more_closely_changes_no_weight(uninterrupted, tmp_path, knob, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _, _, straight = uninterrupted
    cfg = settings(tmp_path, "model.dropout=0.1", knob)
    train(in_directory(cfg, tmp_path / "run"))
    for name, tensor in final_weights(straight).items():
        assert torch.equal(tensor, final_weights(tmp_path / "run")[name]), name


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", pytest.param("soap", marks=NO_SOAP), "sgd"])
def test_every_optimizer_and_batching_trains(tmp_path, batching, optimizer):
    cfg = settings(tmp_path, f"data.batching={batching}", f"optimizer={optimizer}", "optimizer.lr=0.05")
    assert train(in_directory(cfg, tmp_path / "run")) < rows(tmp_path / "run")[0]["val/loss"]


@pytest.mark.skipif(not THE_VERDICT.exists(), reason=f"{THE_VERDICT.name} is not beside the repository")
def test_plain_text_trains_too(tmp_path):
    cfg = settings(tmp_path, "data=text", f"data.path={THE_VERDICT}", "optimizer.lr=0.05")
    assert train(in_directory(cfg, tmp_path / "run")) < rows(tmp_path / "run")[0]["val/loss"] - 0.1


@pytest.fixture(scope="module")
def sweep(workflow):
    """Four jobs, two of which fail on their way: (directory, finished process)."""
    root = workflow[0].parent
    arguments = [
        *SMALL, "-m", "optimizer.lr=1e-3,1e30", "seed=1,1337", f"hydra.sweep.dir={root / 'sweep'}",
        f"data.prepared_dir={root / 'data'}",
    ]  # fmt: skip
    return root / "sweep", run("train.py", *arguments, cwd=root, WANDB_DIR=str(root / "wandb"))


def test_a_sweep_goes_on_after_a_failed_job_and_ends_with_a_table_of_all(sweep):
    directory, result = sweep
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.count("optimizer.lr=1e+30 seed=") == 2  # reported when they fail ...
    assert result.stdout.count(") failed: training stopped at step ") == 2  # ... and under the closing table
    assert result.stdout.splitlines()[-1] == str(directory)
    with open(directory / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["completed", "completed", "failed", "failed"]
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_job_of_a_sweep_is_a_wandb_run_of_its_own_and_so_is_the_sweep(sweep):
    folders = [job.folder for job in jobs.read(sweep[0])[:2]] + [sweep[0]]
    states = [json.loads((folder / "wandb.json").read_text()) for folder in folders]
    assert [state["mode"] for state in states] == ["offline", "offline", "offline"]
    assert len({state["id"] for state in states}) == 3


def test_a_job_of_a_sweep_trains_what_it_would_train_alone(workflow, sweep):
    first, second = (rows(job.folder) for job in jobs.read(sweep[0])[:2])
    assert second == rows(workflow[0]) != first


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["data=text"], 2, "data.path"),
        (["data=alpaca", "data.path=/nowhere.jsonl"], 2, "/nowhere.jsonl"),
        (["device=cuda:63"], 5, "device=cuda:63 is not available"),
        (["train.dtype=tf32"], 5, "tf32"),
        (["schedule.warmup=9999", "train.max_steps=null", "train.max_epochs=1"], 2, "schedule.warmup=9999 is longer"),
        (["data.overflow=drop", "data.mask=all"], 2, "no segment of split train"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(workflow, tmp_path, arguments, code, part):
    cfg = settings(workflow[0].parent, *arguments)
    if "data=" in arguments[0]:
        cfg = settings(tmp_path, *arguments)
    with pytest.raises(UserError) as caught:
        train(in_directory(cfg, tmp_path / "run"))
    assert caught.value.code == code
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_another_architecture_in_the_same_directory_is_refused(workflow):
    run_dir, _ = workflow
    arguments = [*SMALL, "model.n_embd=32", f"out_dir={run_dir}", f"data.prepared_dir={run_dir.parent / 'data'}"]
    before = (run_dir / "config.yaml").read_bytes()
    result = run("train.py", *arguments, cwd=run_dir)
    assert (run_dir / "config.yaml").read_bytes() == before
    assert result.returncode == 3 and len(result.stderr.splitlines()) == 1
    assert "model.n_embd 16 != 32" in result.stderr


def test_a_directory_in_use_is_refused_before_anything_is_written_to_it(workflow, tmp_path):
    cfg = in_directory(settings(workflow[0].parent), tmp_path / "run")
    with (
        directory.owned(tmp_path / "run"),
        pytest.raises(UserError, match=f"run dir in use by pid {os.getpid()}") as caught,
    ):
        train(cfg)
    assert caught.value.code == 6
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_learning_rate_that_makes_the_weights_infinite_stops_the_run_and_names_the_last_good_checkpoint(
    workflow, tmp_path
):
    changes = ["optimizer=sgd", "optimizer.lr=1e30", "train.grad_clip=null", "train.save_every=1", "schedule=constant",
               "schedule.warmup=2"]  # fmt: skip
    cfg = in_directory(settings(workflow[0].parent, *changes), tmp_path / "run")
    with pytest.raises(UserError, match=r"training stopped at step \d.*last good checkpoint: step_0000000\d") as caught:
        train(cfg)
    assert caught.value.code == 4
    assert not all(math.isfinite(value) for value in rows(tmp_path / "run")[-1].values())
    for path in checkpoint.listed(tmp_path / "run" / "checkpoints"):
        assert all(
            tensor.isfinite().all() for tensor in safetensors.torch.load_file(path / checkpoint.WEIGHTS).values()
        )


def test_a_reader_that_leaves_after_one_line_does_not_stop_the_run(workflow, tmp_path):
    run_dir, _ = workflow
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, f"out_dir={tmp_path / 'run'}", "wandb.mode=disabled"]
    command.append(f"data.prepared_dir={run_dir.parent / 'data'}")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT | {"LC_ALL": "C"}
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
    assert (tmp_path / "run" / "last_model.pt").exists()


@pytest.mark.exhaustive
def test_one_batch_is_learned_by_heart(tmp_path):
    result = run("train.py", "debug=overfit", f"out_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert result.returncode == 0
    assert rows(tmp_path / "run")[-1]["train/loss"] < 0.1


@pytest.mark.exhaustive
def test_a_run_needs_nothing_of_the_prepared_data_once_it_is_open(tmp_path):
    """The folder is removed in mid-run, and what is prepared there then is other data."""
    run_dir, data = tmp_path / "run", f"data.prepared_dir={tmp_path / 'data'}"
    long = ["train.max_steps=300", "train.eval_every=50", "train.log_every=1", "train.save_every=300"]
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *long, data, f"out_dir={run_dir}", "wandb.mode=disabled"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path) as process:
        while not (run_dir / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        fingerprint = next((tmp_path / "data").glob("*/meta.json")).parent.name
        shutil.rmtree(tmp_path / "data")
        other = run("prepare_data.py", data, "data.split_seed=5", cwd=tmp_path)
        assert process.poll() is None and other.returncode == 0
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert f"fingerprint {fingerprint}" in (run_dir / "README.md").read_text()
    assert f'"fingerprint": "{fingerprint}' in next(run_dir.glob("checkpoints/step_*/config.json")).read_text()


@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on_from_another_directory_by_the_command_that_it_has_printed(tmp_path):
    """Whatever characters its paths have, and with what was typed relative to where the first start was."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "it's (1), $HOME.txt").write_text("All work and no play makes Jack a dull boy.\n" * 99)
    typed = [*SMALL, "train.max_steps=2000", "train.eval_every=1000", "train.save_every=2000", "data=text",
             "data.path=it's (1), $HOME.txt", "data.prepared_dir=data", "out_dir=lr=1e-3 run",
             "wandb.mode=disabled"]  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), *typed]
    run_dir = tmp_path / "here" / "lr=1e-3 run"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path / "here") as first:
        while not (run_dir / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGINT)
        stderr = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and "to go on: python " in stderr, stderr
    again = stderr.partition("to go on: python ")[2].strip()
    at = checkpoint.read_manifest(checkpoint.listed(run_dir / "checkpoints")[-1]).progress.step
    second = subprocess.run(
        f"{shlex.quote(sys.executable)} {again} train.max_steps={at + 1}",
        shell=True, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path / "elsewhere", timeout=60,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert f"resuming from step_{at:08d}" in second.stdout and second.stdout.endswith(f"{run_dir}\n")
    assert os.listdir(tmp_path / "elsewhere") == [] and (run_dir / "last_model.pt").exists()
    (card,) = (tmp_path / "here" / "data").glob("README.md")
    path = shlex.quote("data.path=it's (1), $HOME.txt")  # its name alone: a card is for others
    assert f"`python prepare_data.py data=text {path}`" in card.read_text()


@pytest.mark.exhaustive
def test_two_runs_with_one_prepared_dir_each_train_on_what_they_have_opened(tmp_path):
    data = f"data.prepared_dir={tmp_path / 'data'}"
    runs = [[*SMALL, data, f"data.split_seed={seed}", f"out_dir={tmp_path / str(seed)}"] for seed in (0, 1)]
    commands = [[sys.executable, str(ROOT / "train.py"), *arguments, "wandb.mode=disabled"] for arguments in runs]
    processes = [subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    fingerprints = set()
    for seed in (0, 1):
        run_dir = tmp_path / str(seed)
        config = json.loads((run_dir / "checkpoints" / "step_00000004" / "config.json").read_text())
        fingerprint = config["data"]["fingerprint"]
        meta = json.loads((tmp_path / "data" / fingerprint[:12] / "meta.json").read_text())
        assert meta["fingerprint"] == fingerprint and meta["settings"]["split_seed"] == seed
        n_tokens = f"{meta['splits']['train']['documents']:,} documents, {meta['splits']['train']['tokens']:,} tokens"
        assert f"{n_tokens}; fingerprint {fingerprint[:12]}" in (run_dir / "README.md").read_text()
        fingerprints.add(fingerprint)
        again = run("train.py", *runs[seed], cwd=tmp_path)
        assert again.returncode == 0 and "already at step 4 of 4" in again.stdout
    assert len(fingerprints) == 2


def test_a_folder_of_the_users_own_is_refused_before_anything_is_written(tmp_path):
    """As out_dir, and as the directory of a sweep."""
    (tmp_path / "mine").mkdir()
    files = dict.fromkeys(("README.md", "config.yaml", "leaderboard.md"), "mine")
    for name, text in files.items():
        (tmp_path / "mine" / name).write_text(text)
    for arguments in (["out_dir=mine"], ["-m", "seed=1,2", "hydra.sweep.dir=mine"]):
        places = [argument.replace("=mine", f"={tmp_path}/mine") for argument in arguments]
        done = run("train.py", *SMALL, f"data.prepared_dir={tmp_path / 'data'}", *places, cwd=tmp_path)
        assert done.returncode == 2 and "it has README.md" in done.stderr, done.stderr
        assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == files
