"""kill -9 at any moment, then the same command again: the same rows and weights as if nothing had happened."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import replace

import pytest
import torch
from test_conf import loaded
from tracing import fork, run_and_kill, text_of, trace

from gpt.data import preparation
from gpt.files.jsonl import read_rows
from gpt.files.paths import PROJECT_ROOT
from gpt.runs import checkpoint
from gpt.terminal import console
from train import train

TIMING = {"tokens_per_second", "memory_gb"}
LONGEST = 240  # seconds in which a group of ranks ends, on a busy machine too
SETTINGS = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "model.dropout=0.1",
    "data.tokenizer=bytes", "train.tokens_per_step=128", "train.micro_batch=1", "train.max_steps=6",
    "train.eval_every=3", "train.eval_tokens=256", "train.log_every=1", "train.save_every=2", "train.sample_every=3",
    "train.keep_checkpoints=1", "sample.max_new_tokens=4", "device=cpu", "wandb.mode=disabled",
]  # fmt: skip


class Run:
    """A run of six steps in `directory`, and what it leaves behind when nobody disturbs it."""

    def __init__(self, directory, *changes):
        self.directory = directory / "run"
        cfg = loaded(*SETTINGS, *changes, f"data.prepared_dir={directory / 'data'}")
        self.cfg = replace(cfg, out_dir=str(self.directory))
        preparation.ensure(self.cfg.data, PROJECT_ROOT)

    def __call__(self):
        train(self.cfg)

    def undisturbed(self):
        """Runs to the end: (this, its result)."""
        torch.set_num_threads(1)
        self.fresh()()
        return self, self.result()

    def with_output(self):
        """As a command does it: what it says goes to stdout and stderr. For a child process."""
        console.setup()
        train(self.cfg)

    def fresh(self):
        shutil.rmtree(self.directory, ignore_errors=True)
        return self

    def rows(self):
        """Rows and samples, times aside."""
        metrics = read_rows(self.directory / "metrics.jsonl")
        samples = read_rows(self.directory / "samples.jsonl")
        return [{k: v for k, v in row.items() if k not in TIMING} for row in metrics], samples

    def result(self):
        """Rows, samples, the names of the checkpoints, and hashes of the last weights and of the optimizer's state."""
        path = checkpoint.listed(self.directory / "checkpoints")[-1]
        manifest = checkpoint.verify(path)
        tensors = checkpoint.read_parts(path, [*manifest.weights, *manifest.state])
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(b"".join([name.encode(), *(part.numpy().tobytes() for part in tensors[name])]))
        names = sorted(entry.name for entry in (self.directory / "checkpoints").iterdir())
        return *self.rows(), names, manifest.progress, digest.hexdigest()

    def state(self):
        """A hash of what the next start finds on the disk, times aside, when it has cleared away what is no checkpoint:
        that is the first thing it does."""
        checkpoint.recover(self.directory / "checkpoints")
        digest = hashlib.sha256()
        for path in sorted(self.directory.rglob("*")):
            if path.is_file() and path.name not in ("train.log", ".lock", "run.json", "metrics.jsonl"):
                digest.update(str(path.relative_to(self.directory)).encode() + path.read_bytes())
        return digest.hexdigest(), json.dumps(self.rows())

    def torn(self):
        """How many directories are there that are no checkpoint yet, or no longer."""
        return len(list((self.directory / "checkpoints").glob(".step_*")))


class Sharded(Run):
    """The same run by two ranks that its model is sharded over."""

    def __init__(self, directory, *changes):
        super().__init__(directory, "parallel=fsdp", *changes)

    def __call__(self, rank=0, decide=lambda operation: None):
        """Runs both ranks and traces one of them: its outcome, and exit code and output of the other."""
        with socket.create_server(("localhost", 0)) as unused:
            port = unused.getsockname()[1]
        with tempfile.TemporaryFile() as output:
            other = fork(lambda: self._as_rank(1 - rank, port), output)
            outcome = trace(lambda: self._as_rank(rank, port), self.directory, decide, LONGEST)
            code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
            return outcome, code, text_of(output)

    def _as_rank(self, rank, port):
        signal.alarm(LONGEST)  # ends a rank that waits for ever
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self.with_output()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("kill")).undisturbed()


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_before_any_file_operation_a_run_goes_on_to_the_same_rows_and_weights(
    undisturbed, record_property, every
):
    """All operations of the run in its directory are enumerated, and the run is killed before each of them. A start
    after a kill sees only what is on the disk: where that is the same as after another kill, it is not tried twice."""
    run, expected = undisturbed
    operations = trace(run.fresh(), run.directory).operations
    assert run.result() == expected  # being watched changes nothing
    kinds = {operation.name for operation in operations}
    assert {"mkdir", "create", "write", "fsync", "rename", "unlink", "rmdir"} <= kinds
    seen, torn = set(), 0
    for operation in operations[::every]:
        outcome = trace(run.fresh(), run.directory, lambda op, n=operation.number: "kill" if op.number == n else None)
        assert outcome.code == -9, f"{operation}: {outcome.output}"
        torn += run.torn() > 0
        state = run.state()
        if state in seen:
            continue
        seen.add(state)
        resumed = trace(run, run.directory)
        assert resumed.code == 0, f"killed before {operation}: {resumed.output}"
        assert run.result() == expected, f"killed before {operation}"
    assert torn > 40 // every and len(seen) > 40 // every
    chosen = f"{len(operations[::every])} of {len(operations)} file operations"
    record_property("count", f"kill -9 before {chosen}: {torn} with a torn checkpoint on the disk, "
                             f"{len(seen)} different states resumed, 0 differ")  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_before_any_file_operation_of_a_save_leaves_whole_checkpoints_and_the_run_goes_on(
    tmp_path, rank, record_property
):
    """In the save of step 4 each rank writes two files; the first adds the others and clears older steps away."""
    run, expected = Sharded(tmp_path).undisturbed()
    operations = run.fresh()(rank)[0].operations
    assert run.result() == expected
    (first, *_), (after, *_) = ([op.number for op in operations if f"{n}.new/" in op.path] for n in (4, 6))
    chosen = [op for op in operations if first <= op.number < after and op.path.startswith("checkpoints")]
    assert len(chosen) >= 10
    seen = set()
    for operation in chosen:
        killed, code, output = run.fresh()(rank, lambda op, n=operation.number: "kill" if op.number == n else None)
        assert killed.code == -9 and code == 5 and f"error: rank {rank} has ended" in output, f"{operation}: {output}"
        whole = checkpoint.listed(run.directory / "checkpoints")
        assert whole and all(map(checkpoint.is_valid, whole)), operation
        state = run.state()
        if state not in seen:
            resumed, code, _ = run()
            assert resumed.code == code == 0, f"killed before {operation}: {resumed.output}"
            assert run.result() == expected, f"killed before {operation}"
        seen.add(state)
    record_property("count", f"kill -9 of rank {rank} of 2 before each of {len(chosen)} file operations of a save: "
                             f"{len(seen)} different states resumed, 0 differ")  # fmt: skip


def kill_at_random(run, expected, points, seed):
    """Kills a run at `points` random moments, each followed by another start, which may be killed too; lets it end and
    compares. Returns how many kills hit a running process, how many of those left a torn checkpoint, how many runs."""
    draw = random.Random(seed)
    started = time.perf_counter()
    assert not run_and_kill(run.fresh(), 60)
    whole = time.perf_counter() - started
    landed = torn = runs = 0
    while landed < points:
        run.fresh()
        runs += 1
        # Each run is killed again after it was resumed, some of them twice.
        for _ in range(draw.choice([2, 2, 3])):
            if run_and_kill(run, draw.uniform(0, whole)):
                landed += 1
                torn += run.torn() > 0
        resumed = trace(run, run.directory)
        assert resumed.code == 0, f"seed {seed}, run {runs}: {resumed.output}"
        assert run.result() == expected, f"seed {seed}, run {runs}"
    return landed, torn, runs


def test_killed_at_random_moments_a_run_goes_on_to_the_same_rows_and_weights(undisturbed, record_property):
    landed, torn, runs = kill_at_random(*undisturbed, points=10, seed=1)
    record_property(
        "count", f"kill -9 at {landed} random moments of {runs} runs: {torn} left a torn checkpoint, 0 differ"
    )


def prepared_bytes(directory):
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_while_it_prepares_data_the_next_start_finds_all_of_it_or_does_it_again(undisturbed, tmp_path, every):
    cfg = undisturbed[0].cfg.data
    cfg = replace(cfg, prepared_dir=str(tmp_path / "data"))
    preparation.prepare(cfg, PROJECT_ROOT)
    for rebuild in (False, True):  # a directory that is not there yet, and one that is replaced
        expected = prepared_bytes(tmp_path / "data")
        if not rebuild:
            shutil.rmtree(tmp_path / "data")
        operations = trace(lambda: preparation.prepare(cfg, PROJECT_ROOT), tmp_path).operations
        for number in range(1, len(operations) + 1, every):
            if not rebuild:
                shutil.rmtree(tmp_path / "data", ignore_errors=True)
            killed = trace(
                lambda: preparation.prepare(cfg, PROJECT_ROOT),
                tmp_path,
                lambda op, n=number: "kill" if op.number == n else None,
            )
            assert killed.code == -9
            preparation.ensure(cfg, PROJECT_ROOT)
            assert prepared_bytes(tmp_path / "data") == expected, operations[number - 1]
        # What was half made may stay beside data that is in order, until the next time.
        assert {path.name for path in tmp_path.iterdir()} - {".data.new", "data.lock"} == {"data"}


VARIETY = {
    "muon, bucketed": ["optimizer=muon", "data.batching=bucketed", "schedule=wsd"],
    "sgd, padded": ["optimizer=sgd", "data.batching=padded", "schedule=constant", "optimizer.lr=0.01"],
    "early stopping": ["optimizer.lr=1e-12", "train.patience=2", "train.eval_every=1", "train.max_steps=20"],
    "several epochs, cut documents": [
        "data.overflow=truncate",
        "data.mask=all",
        "train.tokens_per_step=4096",
        "schedule=linear",
    ],
    "one batch, clipped": ["train.one_batch=true", "train.grad_clip=0.01", "train.max_steps=5", "train.save_every=1"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", VARIETY)
def test_whatever_its_settings_a_killed_run_goes_on_to_the_same_rows_and_weights(tmp_path, name, record_property):
    landed, torn, runs = kill_at_random(*Run(tmp_path, *VARIETY[name]).undisturbed(), points=20, seed=2)
    record_property("count", f"{name}: kill -9 at {landed} random moments of {runs} runs: {torn} torn, 0 differ")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(10, 20))
def test_killed_at_500_random_moments(undisturbed, seed, record_property):
    landed, torn, runs = kill_at_random(*undisturbed, points=50, seed=seed)
    record_property("count", f"seed {seed}: kill -9 at {landed} random moments of {runs} runs: {torn} torn, 0 differ")
