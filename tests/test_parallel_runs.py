"""Several processes share a run: the numbers of one process, one record, and what happens when a rank goes."""

import json
import os
import random
import re
import signal
import time

import pytest
import torch
from conftest import ROOT
from group import CASES, course, finish, lines, own_lines, ranks_of, run, start, wait_for
from test_kill import SETTINGS, TIMING, Run

from gpt.files.jsonl import read_rows
from gpt.machine.ranks import ALONE

COURSES = """
from group import CASES, course
found = [course(ranks, *case) for case in CASES]
if ranks.is_first:
    import json
    print("courses " + json.dumps(found), flush=True)
"""
LONGER = [
    "train.dtype=float32",
    "train.max_steps=60",
    "train.eval_every=20",
    "train.save_every=10",
    "train.sample_every=null",
]


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_any_number_of_ranks_has_the_losses_of_one_process(tmp_path, n, record_property):
    """Over 50 steps, with parts that are not equal and ranks without a row."""
    code, output = lines(tmp_path, n, COURSES)
    assert code == 0, output
    [line] = [line for line in output.splitlines() if line.startswith("courses ")]
    worst = {}
    for case, found in zip(CASES, json.loads(line.removeprefix("courses ")), strict=True):
        alone = course(ALONE, *case)
        differences = [abs(a - b) / abs(b) for a, b in zip(found, alone, strict=True)]
        limit = 1e-10 if case[1] == torch.float64 else 1e-4
        assert max(differences) < limit and differences[0] < max(limit / 100, 1e-10), case
        worst[case[1]] = max(*differences, worst.get(case[1], 0))
    text = ", ".join(f"{dtype} {difference:.0e}" for dtype, difference in worst.items())
    record_property("count", f"{n} ranks against one process, 50 steps: largest relative difference {text}")


class Group(Run):
    """A run of `n` ranks in `directory`, by the command that its user types."""

    def __init__(self, directory, n, *changes):
        super().__init__(directory, *changes)
        self.n = n
        self.typed = [*SETTINGS, *changes, f"data.prepared_dir={directory / 'data'}", f"out_dir={self.directory}"]

    def start(self, *options, n=None):
        return start(n or self.n, "train.py", *self.typed, options=options)

    def whole(self):
        """Runs to the end: (its output, its result)."""
        self.fresh()
        code, output = finish(self.start())
        assert code == 0, output
        return output, self.result()

    def is_at(self, step):
        rows = read_rows(self.directory / "metrics.jsonl")
        return bool(rows) and rows[-1]["step"] >= step


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def pair(tmp_path_factory, request):
    """A run of two ranks that nobody disturbs: the run, its output, its result."""
    group = Group(tmp_path_factory.mktemp("pair"), 2, *LONGER, f"parallel={request.param}")
    return group, *group.whole()


def test_a_run_of_two_ranks_is_one_run_on_the_terminal_and_on_the_disk(pair):
    group, output, _ = pair
    steps = re.findall(r"^step (\d+)/60", output, re.M)
    assert steps == sorted(set(steps), key=int) and len(steps) == 61 and output.count("best val/loss") == 1
    assert {path.name for path in group.directory.iterdir()} >= {
        "config.yaml",
        "last_model.pt",
        "README.md",
        "loss.png",
    }
    assert (group.directory / "train.log").read_text().count("step 20/60") == 1


@pytest.mark.exhaustive
def test_two_kills_of_ranks_and_torchrun_goes_on_by_itself_to_the_same_rows_and_weights(pair):
    group, _, expected = pair
    group.fresh()
    torchrun = group.start("--max-restarts=3")
    for step, rank in ((15, 1), (35, 0)):
        wait_for(lambda step=step: group.is_at(step))
        os.kill(ranks_of(torchrun)[rank], signal.SIGKILL)
    code, output = finish(torchrun)
    assert code == 0 and group.result() == expected, output
    errors = [line for line in own_lines(output) if line.startswith("error")]
    assert len(errors) == 2 and "error: rank 1 has ended (pid " in errors[0], output
    assert errors[1].startswith("error: rank 0 has ended (pid ") and "to go on: torchrun" in errors[1]


def kill_at_random(group, expected, kills, seed):
    """Kills ranks, each at a random moment, until `kills` have hit a running one. Returns the longest time that a group
    has taken to end, and the number of runs."""
    draw, slowest, landed, runs = random.Random(seed), 0.0, 0, 0
    started = time.monotonic()
    assert group.whole()[1] == expected
    whole = time.monotonic() - started
    while landed < kills:
        group.fresh()
        runs += 1
        for _ in range(3):
            torchrun = group.start()
            time.sleep(draw.uniform(0.2, 0.9) * whole)
            ranks = ranks_of(torchrun)
            if ranks and torchrun.poll() is None:
                os.kill(draw.choice(ranks), signal.SIGKILL)
                killed = time.monotonic()
                code, output = finish(torchrun)
                slowest = max(slowest, time.monotonic() - killed)
                landed += code != 0
                assert len([line for line in own_lines(output) if line.startswith("error")]) <= 1, output
            else:
                finish(torchrun)
        code, output = finish(group.start())
        assert code == 0 and group.result() == expected, f"seed {seed}, run {runs}: {output}"
    return slowest, runs


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [2, 4])
def test_15_kills_at_random_moments(tmp_path, n, record_property):
    group = Group(tmp_path, n, *LONGER)
    _, expected = group.whole()
    slowest, runs = kill_at_random(group, expected, 15, seed=n)
    assert slowest < 30
    record_property("count", f"{n} ranks: 15 kills in {runs} runs, ended within {slowest:.1f} s, all resumed, 0 differ")


@pytest.mark.exhaustive
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """2, then one process, then 4: the same rows, and the losses of a run of one process that nobody has disturbed."""
    group = Group(tmp_path, 2, *LONGER, "model.dropout=0.0")
    _, whole = Run(tmp_path / "alone", *LONGER, "model.dropout=0.0").undisturbed()
    for n, step in ((2, 15), (1, 35)):
        torchrun = group.start(n=n)
        wait_for(lambda step=step: group.is_at(step))
        os.kill(torchrun.pid, signal.SIGTERM)
        code, output = finish(torchrun)
        assert "interrupted by SIGTERM: step_000000" in output, output
    code, output = finish(group.start(n=4))
    assert code == 0 and "resuming from step_000000" in output, output
    assert output.count("warning: 2 of 4 ranks have nothing to compute in steps of 2 rows") == 1
    ours, theirs = group.rows()[0], whole[0]
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in b if key not in TIMING)


@pytest.mark.exhaustive
def test_a_run_of_two_ranks_goes_on_sharded_and_then_as_one_process(tmp_path):
    """First with ddp, then with fsdp: the same rows, and the losses of one undisturbed process."""
    group = Group(tmp_path, 2, *LONGER, "model.dropout=0.0")
    _, whole = Run(tmp_path / "alone", *LONGER, "model.dropout=0.0").undisturbed()
    for parallel, step in (("ddp", 15), ("fsdp", 35)):
        torchrun = start(2, "train.py", *group.typed, f"parallel={parallel}")
        wait_for(lambda step=step: group.is_at(step))
        os.kill(torchrun.pid, signal.SIGTERM)
        code, output = finish(torchrun)
        assert code != 0 and "interrupted by SIGTERM: step_000000" in output, output
        newest = max((group.directory / "checkpoints").iterdir())
        assert (newest / "model.2-of-2.safetensors").exists() == (parallel == "fsdp")
    Run(tmp_path, *LONGER, "model.dropout=0.0")()
    ours, theirs = group.rows()[0], whole[0]
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in b if key not in TIMING)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("n", "change"), [(4, "seed=1"), (2, "train.dtype=bfloat16"), (2, "optimizer=muon")])
def test_a_sharded_run_has_the_losses_of_one_process(tmp_path, n, change, record_property):
    """Over 60 steps. What is computed in bfloat16, as matrix products are there, differs in the third digit where
    sums over ranks, which are in float32, differ in the last: see test_sharding.py."""
    changes = [*LONGER, "model.dropout=0.0", "train.sample_every=30", change]
    _, (ours, samples, *_) = Group(tmp_path, n, "parallel=fsdp", *changes).whole()
    _, (theirs, *_) = Run(tmp_path / "alone", *changes).undisturbed()
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b if key.endswith("/loss")]
    worst = max(abs(a - b) / b for a, b in pairs)
    assert len(pairs) == 64 and len(samples) == 6 and worst < 1e-4
    record_property("count", f"{n} ranks with fsdp, {change}: losses of one process to {worst:.0e}, 60 steps")


def disturbed(group, number, rank):
    """Sends a signal at step 15 to a rank or, None, to torchrun: seconds until the end, exit code, output."""
    group.fresh()
    torchrun = group.start()
    wait_for(lambda: group.is_at(15))
    os.kill(torchrun.pid if rank is None else ranks_of(torchrun)[rank], number)
    sent = time.monotonic()
    code, output = finish(torchrun)
    return time.monotonic() - sent, code, output


ENDLESS = [
    "train.dtype=float32",
    "train.max_steps=1000000",
    "train.eval_every=1000000",
    "train.save_every=10",
    "train.sample_every=null",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_the_group_within_30_seconds(tmp_path, rank):
    group = Group(tmp_path, 2, *ENDLESS)
    seconds, code, output = disturbed(group, signal.SIGSTOP, rank)
    assert code == 1 and seconds < 30, output
    assert f"error: rank {rank} is stopped (pid " in output and group.result()


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_or_to_any_rank_saves_the_same_step_in_all(tmp_path, rank, number):
    group = Group(tmp_path, 2, *ENDLESS)
    seconds, _, output = disturbed(group, number, rank)
    errors = [line for line in own_lines(output) if line.startswith("error")]
    assert len(errors) == 1 and f"interrupted by {number.name}: step_" in errors[0] and seconds < 30, output
    saved = re.search(r"step_\d+", errors[0])[0]
    assert (group.directory / "checkpoints" / saved).is_dir() and "exitcode  : -9" not in output


RANK_1 = """
import os, runpy, sys
sys.path[0] = {root!r}
from gpt import loop
if os.environ["RANK"] == "1":
    {deed}
sys.argv[0] = "train.py"
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""
FULL = """step, calls = loop.train_step, []
    def full(*arguments):
        calls.append(1)
        return step(*arguments) if len(calls) < 15 else __import__("torch").empty(2**60)
    loop.train_step = full"""


NO_ROOM = """import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"""
WRONG = [
    ("sys.argv.append('seed=2')", "error: rank 1: its settings are other than those of rank 0: seed 2 != 1337"),
    ("sys.argv.append('seed=-2')", "error: rank 1: seed=-2: input should be greater than or equal to 0"),
    (FULL, "error: rank 1: out of memory: "),
    ("loop.train_step = None", "error: rank 1: TypeError: 'NoneType' object is not callable (this is a bug"),
    ("loop.evaluate = None", "error: rank 1: TypeError: 'NoneType' object is not callable (this is a bug"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("parallel", "deed", "expected"),
    [("ddp", *wrong) for wrong in WRONG]
    + [("fsdp", *wrong) for wrong in [*WRONG, (NO_ROOM, "error: checkpoint 30 not written: ")]],
)
def test_what_is_wrong_in_one_rank_is_said_once_and_ends_all(tmp_path, parallel, deed, expected):
    group = Group(tmp_path, 2, *ENDLESS, f"parallel={parallel}")
    script = tmp_path / "rank_1.py"
    script.write_text(RANK_1.format(root=str(ROOT), deed=deed))
    started = time.monotonic()
    code, output = run(2, str(script), *group.typed)
    errors = [line for line in own_lines(output) if line.startswith("error")]
    assert code == 1 and len(errors) == 1 and errors[0].startswith(expected), output
    assert time.monotonic() - started < 90 and 'Traceback (most recent call last):\n  File "train.py' not in output


# The path of the data leads each rank to a folder of its own, as a local disk does on each machine.
LOCAL_DATA = [
    "data=text",
    "data.tokenizer=bytes",
    "data.path=/proc/self/cwd/text.txt",
    "data.prepared_dir=/proc/self/cwd/data",
    "train.max_steps=2",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_same", [True, False])
def test_a_rank_with_data_of_its_own_shares_a_run_only_if_that_is_the_same(tmp_path, is_same):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        text = "".join(f"{n * n + rank * (not is_same)} " for n in range(3000))
        (tmp_path / str(rank) / "text.txt").write_text(text)
    script, deed = tmp_path / "rank_1.py", f"os.chdir({str(tmp_path / '1')!r})"
    script.write_text(f"import os\nos.chdir({str(tmp_path / '0')!r})\n" + RANK_1.format(root=str(ROOT), deed=deed))
    code, output = run(2, str(script), *SETTINGS, *LOCAL_DATA, f"out_dir={tmp_path / 'run'}")
    errors = [line for line in own_lines(output) if line.startswith("error")]
    expected = "error: rank 1: its settings or its data are other than those of rank 0: data.fingerprint "
    assert (code, len(errors)) == (int(not is_same), int(not is_same)), output
    assert is_same or errors[0].startswith(expected), output


@pytest.mark.exhaustive
def test_only_the_first_rank_reads_data_through_that_all_of_them_see(tmp_path):
    group = Group(tmp_path, 2, *LONGER)
    deed = "__import__('gpt.data.token_files').data.token_files._read_through = None"
    (script := tmp_path / "rank_1.py").write_text(RANK_1.format(root=str(ROOT), deed=deed))
    code, output = run(2, str(script), *group.typed)
    assert code == 0, output


@pytest.mark.exhaustive
def test_what_is_wrong_in_all_ranks_is_said_once(tmp_path):
    group = Group(tmp_path, 2, *ENDLESS)
    for change, expected in (
        ("optimizer.lr=-1", "error: optimizer.lr=-1: input should be greater than 0"),
        ("optimizer.lr=1e30", "error: training stopped at step "),
    ):
        code, output = run(2, "train.py", *group.typed, change, "train.grad_clip=null")
        errors = [line for line in own_lines(output) if line.startswith("error")]
        assert code == 1 and len(errors) == 1 and errors[0].startswith(expected), output


@pytest.mark.exhaustive
def test_a_directory_has_one_group_at_a_time(tmp_path):
    group = Group(tmp_path, 2, *ENDLESS)
    first = group.start()
    wait_for(lambda: group.is_at(1))
    _, output = finish(group.start())
    os.kill(first.pid, signal.SIGTERM)
    assert finish(first)[1].count("interrupted by SIGTERM") == 1
    errors = [line for line in own_lines(output) if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error: run dir in use by pid "), output


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate.py", "checkpoint=latest", "prompt=x"], "error: generate.py is one process (WORLD_SIZE=2)"),
        (["evaluate.py", "checkpoint=latest"], "error: evaluate.py is one process (WORLD_SIZE=2)"),
        (["prepare_data.py"], "error: prepare_data.py is one process (WORLD_SIZE=2)"),
        (["train.py", "-m", "seed=1,2"], "hydra/launcher=torchrun hydra.launcher.nproc_per_node=2"),
        (["train.py", "experiments=lr_vs_context"], "hydra/launcher=torchrun hydra.launcher.nproc_per_node=2"),
    ],
)
def test_what_ranks_cannot_share_is_refused_in_one_line(arguments, expected):
    code, output = run(2, *arguments)
    errors = [line for line in own_lines(output) if line.startswith("error")]
    assert code == 1 and len(errors) == 1 and expected in errors[0], output
