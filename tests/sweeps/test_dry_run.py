"""dry_run=true as its user runs it: what it prints, and that nothing is written."""

import json
import os
import re
import subprocess
import sys

import group
import pytest
import torch
from conftest import ROOT
from test_conf import loaded
from test_train import SMALL

from gpt.data import preparation
from gpt.machine import cost, memory
from gpt.machine.sizes import count_sizes
from gpt.sweeps import dry_run

# One process for all command lines, as torch takes seconds to load. An audit hook sees every file that is opened for
# writing and everything that is made, renamed or removed.
PROGRAM = """
import contextlib, io, json, os, runpy, sys, tempfile
changes = []
tempfile.gettempdir()  # finds out with a file of its own where temporary files may be, once in a process
VERBS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"}

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0] != os.devnull:
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            changes.append(f"open {arguments[0]}")
    elif event in VERBS:
        changes.append(f"{event} {arguments[0]}")

sys.addaudithook(hook)
open("probe", "w").close()
assert changes.pop() == "open probe"
os.chdir("/")
for arguments, columns in json.loads(sys.argv[1]):
    changes.clear()
    out, err = io.StringIO(), io.StringIO()
    os.environ["COLUMNS"] = columns
    sys.argv = ["train.py", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(TRAIN, run_name="__main__")
            code = None
        except SystemExit as error:
            code = error.code
    answer = {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue(), "changes": changes}
    print(json.dumps(answer | {"wandb": "wandb" in sys.modules}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command line printed, its code, and what it changed on disk."""
    tmp_path = tmp_path_factory.mktemp("dry")
    ready, missing = f"data.prepared_dir={tmp_path / 'ready'}", f"data.prepared_dir={tmp_path / 'missing'}"
    preparation.ensure(loaded("data.tokenizer=bytes", ready).data, ROOT)
    small = [*SMALL, "dry_run=true", "data.tokenizer=bytes", f"out_dir={tmp_path / 'run'}"]
    free = [argument for argument in small[:-1] if not argument.startswith("model.context_length")]
    sweep = ["-m", *free, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    lines = {
        "single": [*small, ready, "train.micro_batch=auto"],
        "sweep": [*sweep, ready, "optimizer.lr=1e-4,3e-4", "model.n_head=2,3"],
        "misspelt": [*small, ready, "optimizer.lrr=1"],
        "no device": [*small, ready, "device=cuda:77"],
        "too large": [*small, ready, "model.n_embd=131072", "model.n_layer=96"],
        "steps without data": [*small, missing],
        "epochs without data": [*small, missing, "train.max_steps=null", "train.max_epochs=2"],
        "no data at all": [*small, missing, "data.path=/nowhere.csv"],
        "experiment": [
            *free, ready, "experiments=lr_vs_context", "data=sample", "train.tokens_per_step=256",
            "optimizer.lr=0.01", "seed=3",
        ],
    }  # fmt: skip
    requests = [(arguments, "50" if name == "sweep" else "120") for name, arguments in lines.items()]
    result = subprocess.run(
        [sys.executable, "-c", f"TRAIN = {str(ROOT / 'train.py')!r}\n" + PROGRAM, json.dumps(requests)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = dict(zip(lines, map(json.loads, result.stdout.splitlines()), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe", "ready"]
    return found


def test_nothing_is_written_and_wandb_is_not_even_loaded(answers, record_property):
    assert {name: answer["changes"] for name, answer in answers.items() if answer["changes"]} == {}
    assert not any(answer["wandb"] for answer in answers.values())
    record_property("count", f"{len(answers)} dry runs: nothing opened for writing, made, renamed or removed")


def test_a_single_run_is_a_list_of_parameters_memory_batch_budget_and_time(answers):
    answer = answers["single"]
    assert (answer["code"], answer["stderr"]) == (0, "")
    facts = dict(re.split(r" {2,}", line, maxsplit=1) for line in answer["stdout"].splitlines() if "  " in line)
    assert list(facts) == ["model", "memory", "batch", "budget", "time"]
    assert "8,448 parameters" in facts["model"] and "128 tokens a step, 2 x 64 at a time" in facts["batch"]
    assert facts["budget"].startswith("4 steps (train.max_steps), 5") and "an estimate" in facts["time"]
    parts = [float(size) for size in re.findall(r" ([0-9.]+)[,)]", facts["memory"])]
    assert sum(parts) == pytest.approx(float(facts["memory"].split()[1]), abs=0.1)


def test_a_sweep_is_a_table_with_a_row_for_each_job_and_a_total(answers):
    answer = answers["experiment"]  # which brings its own axes
    assert (answer["code"], answer["stderr"]) == (0, "")
    header, *jobs = [line.split() for line in answer["stdout"].splitlines() if line[:1] in set("j012")]
    assert header == [
        "job",
        "model.context_length",
        "fits",
        "minutes",
        "GB",
        "micro-batch",
        "steps",
        "tokens",
        "parameters",
    ]
    assert [job[:3] for job in jobs] == [["0", "64", "yes"], ["1", "128", "yes"], ["2", "256", "yes"]]
    tokens = [int(job[-2].replace(",", "")) for job in jobs]
    assert f"together 12 steps, {sum(tokens):,} tokens, about " in answer["stdout"]


def test_in_a_narrow_terminal_no_number_of_the_table_is_cut(answers):
    answer = answers["sweep"]
    table = [line for line in answer["stdout"].splitlines() if line[:1].isdigit()]
    assert len(table) == 4 and max(map(len, table)) <= 50
    assert [line.split()[:4] for line in table[:2]] == [["0", "2", "0.0001", "yes"], ["1", "2", "0.0003", "yes"]]
    assert not any(".." in line for line in table)


def test_what_is_wrong_is_reported_as_in_a_real_run(answers):
    codes = {name: answer["code"] for name, answer in answers.items() if answer["code"]}
    assert codes == {"sweep": 1, "misspelt": 2, "no device": 5, "no data at all": 2}
    assert "did you mean optimizer.lr?" in answers["misspelt"]["stderr"]
    assert "/nowhere.csv does not exist" in answers["no data at all"]["stderr"]
    assert [answers[name]["stderr"].count("\n") for name in codes] == [2, 1, 1, 1]
    assert "error: job 3 (model.n_head=3 optimizer.lr=0.0003): model.n_embd 16 is not" in answers["sweep"]["stderr"]
    assert re.search("^together 8 steps.*; 2 left out$", answers["sweep"]["stdout"], re.MULTILINE)


def test_a_run_that_does_not_fit_is_marked(answers):
    assert answers["too large"]["code"] == 0
    assert re.search(r"warning: this run does not fit: it needs about \d+", answers["too large"]["stderr"])


def test_without_prepared_data_the_steps_are_known_unless_epochs_decide(answers):
    known, unknown = answers["steps without data"]["stdout"], answers["epochs without data"]["stdout"]
    assert "4 steps (train.max_steps), 512 tokens" in known and "data=sample is not prepared yet" in known
    assert "budget  not known" in unknown and "the length of an epoch is not known" in unknown


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ([], "small, 124,439,808 parameters, context 1024"),
        (["finetune=lora"], "small, 124,439,808 parameters, 589,824 trained (finetune=lora), context 1024"),
        (["finetune=last_blocks"], "small, 124,439,808 parameters, 14,177,280 trained (finetune=last_blocks), context"),
    ],
)
def test_what_is_fine_tuned_is_said_with_the_number_of_weights_trained(chosen, text, caplog):
    caplog.set_level("INFO", "gpt")
    cfg = loaded("model=small", *chosen)
    sizes = count_sizes(cfg.model, cfg.finetune, 50257)
    dry_run.show(
        cost.Cost(
            cfg=cfg, parameters=sizes.parameters, trained=sizes.trained,
            memory=memory.estimate(cfg, 50257, 1, "cpu", torch.float32), available=10**12, micro_batch=1, steps=None,
            budget="train.max_epochs", tokens=None, seconds=None, where="cpu", note="", ranks=1,
        )
    )  # fmt: skip
    assert f"model   {text}" in caplog.text


@pytest.mark.exhaustive
def test_ranks_are_told_what_each_of_them_takes_and_who_has_nothing_to_do(tmp_path):
    ready = f"data.prepared_dir={tmp_path / 'ready'}"
    preparation.ensure(loaded("data.tokenizer=bytes", ready).data, ROOT)
    typed = [*SMALL, "dry_run=true", "data.tokenizer=bytes", ready, f"out_dir={tmp_path / 'run'}", "device=cpu"]
    ddp, fsdp = (group.run(3, "train.py", *typed, f"parallel={name}") for name in ("ddp", "fsdp"))
    assert ddp[0] == fsdp[0] == 0 and not (tmp_path / "run").exists()
    for _, output in (ddp, fsdp):
        assert output.count("memory  about ") == output.count(" GB can be had for each of 3 ranks") == 1, output
        assert " an estimate without what ranks exchange" in output and "warning" not in output
        assert "1 of 3 ranks have nothing to compute in steps of 2 rows; start 2," in output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.4, "3 s"), (89, "89 s"), (91, "2 min"), (7380, "2 h 3 min"), (7200, "2 h"), (90000, "1 d 1 h")],
)
def test_times_are_written_as_one_says_them(seconds, text):
    assert dry_run.in_time(seconds) == text
