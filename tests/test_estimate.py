"""Estimates against what is counted and measured; the rows that micro_batch=auto chooses."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, model_config, run_config
from test_conf import loaded
from test_train import SMALL, in_directory, rows, settings
from torch.utils.flop_counter import FlopCounterMode

from gpt import checkpoint, estimate
from gpt.model import GPT
from train import train

VOCABULARY = 61
GB = 10**9


def saved_bytes(model, tokens, itemsize, masked):
    """Bytes that autograd keeps of a forward pass, weights and copies of them not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    matrices = {*shapes, *(shape[::-1] for shape in shapes)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and (tuple(tensor.shape) not in matrices or itemsize == 4):
            kept[storage.data_ptr()] = storage  # alive as long as this is: nothing else gets its address
        return tensor

    B, T = tokens.shape
    positions, documents = (torch.zeros(B, T, dtype=torch.long) for _ in range(2)) if masked else (None, None)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2),
    ):
        model.hidden(tokens, positions, documents)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("itemsize", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["one document a row", "several"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_bytes_that_a_block_keeps_of_a_token_are_those_that_autograd_keeps(dropout, masked, itemsize):
    B, T = 3, 40  # so that no activation has the shape of a weight
    one, two = (model_config(n_layer=n, n_embd=32, n_head=4, context_length=T, dropout=dropout) for n in (1, 2))
    tokens = torch.randint(VOCABULARY, (B, T))
    counted = [saved_bytes(GPT(config, VOCABULARY).train(), tokens, itemsize, masked) for config in (one, two)]
    assert (counted[1] - counted[0]) / (B * T) == estimate.block_bytes(one, itemsize, masked, on_cpu=True)


def test_the_operations_of_a_token_are_those_that_torch_counts():
    config = model_config(n_layer=3, n_embd=32, n_head=4, context_length=24, dropout=0.1)  # attention as plain products
    tokens = torch.randint(VOCABULARY, (2, 24))
    with FlopCounterMode(display=False) as counter:
        GPT(config, VOCABULARY).train()(tokens).sum().backward()
    assert counter.get_total_flops() == sum(estimate.flops_per_token(config, VOCABULARY)) * tokens.numel()


def test_the_flops_of_gpt2_small_are_six_times_its_matrices_and_attention():
    blocks, head = estimate.flops_per_token(loaded("model=small").model, 50257)
    assert blocks == 6 * 84_934_656 + 12 * 12 * 1024 * 768
    assert head == 6 * 38_597_376
    again, same = estimate.flops_per_token(loaded("model=small").model, 50257, checkpointing=True)
    assert (again / blocks, same) == (pytest.approx(4 / 3), head)


MEASURE = """
import json, sys
from conftest import made_split, run_config
import torch
from gpt import device, estimate, free_memory, loop, optim
from gpt.data import TrainBatches
from gpt.model import GPT
device.keep_memory()
shape, rows, vocab_size = json.loads(sys.argv[1])
cfg = run_config(shape, rows)
split = made_split([cfg.model.context_length // 2 + 1] * 4 * rows, vocab_size=min(vocab_size, 50000))
batches = TrainBatches(split, cfg.data, cfg.model.context_length, cfg.train, 0)
model = GPT(cfg.model, vocab_size).train()
optimizer = optim.build(model, cfg.optimizer)
for step in range(2):
    loop.train_step(model, optimizer, batches.step(step), torch.device("cpu"), torch.float32, 1.0)
print(free_memory.peak())
"""


exhaustive = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("shape", "n_rows", "vocab_size"),
    [
        pytest.param({"context_length": 512, "dropout": 0.1}, 4, 257, id="dropout"),
        pytest.param({"context_length": 128}, 4, 50257, id="vocabulary", marks=exhaustive),
        pytest.param({"context_length": 512}, 16, 257, id="rows", marks=exhaustive),
        pytest.param(
            {"context_length": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}, 8, 50257, id="mini", marks=exhaustive
        ),
        pytest.param({"context_length": 1024, "n_embd": 64}, 2, 50257, id="context", marks=exhaustive),
    ],
)
def test_the_peak_memory_of_a_process_is_within_15_percent_of_the_estimate(shape, n_rows, vocab_size, record_property):
    command = [sys.executable, "-c", MEASURE, json.dumps([shape, n_rows, vocab_size])]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=path)
    assert result.returncode == 0, result.stderr
    measured = int(result.stdout)
    expected = estimate.memory(run_config(shape, n_rows), vocab_size, n_rows, "cpu", 4).total
    record_property("count", f"peak memory: {measured / 1e6:.0f} MB measured, {expected / 1e6:.0f} MB estimated")
    assert expected == pytest.approx(measured, rel=0.15)


def test_memory_grows_with_rows_and_shrinks_with_checkpointing():
    shape = {"context_length": 64}
    totals = [estimate.memory(run_config(shape, 64), 257, n, "cpu", 4).total for n in (8, 16, 32)]
    assert totals == sorted(totals) and len(set(totals)) == 3
    deep, cheaper = (run_config(shape | {"n_layer": 12}, 64, gradient_checkpointing=on) for on in (False, True))
    assert estimate.memory(cheaper, 257, 64, "cpu", 4).total < estimate.memory(deep, 257, 64, "cpu", 4).total


def test_as_many_rows_are_chosen_as_fit_a_power_of_two():
    cfg = run_config({"context_length": 32}, 8, tokens_per_step=32 * 48, micro_batch="auto")
    need = {n: estimate.memory(cfg, 257, n, "cpu", 4).total for n in (1, 2, 4, 8, 16, 32)}
    assert all(estimate.fitting_rows(cfg, 257, "cpu", 4, total) == n for n, total in need.items())
    assert all(estimate.fitting_rows(cfg, 257, "cpu", 4, total - 1) == n // 2 for n, total in need.items() if n > 1)
    assert estimate.fitting_rows(cfg, 257, "cpu", 4, 0) == 1  # then it is tried all the same
    assert estimate.fitting_rows(cfg, 257, "cpu", 4, 1000 * GB) == 32  # of the 48 of a step


def test_no_more_rows_are_chosen_than_make_a_step_faster():
    cfg = run_config({"context_length": 512}, 8, tokens_per_step=2**20, micro_batch="auto")
    for kind, tokens in estimate.USEFUL_TOKENS.items():
        assert estimate.fitting_rows(cfg, 257, kind, 4, 10**15) * 512 == tokens
    long = run_config({"context_length": 2**20}, 1, tokens_per_step=2**20, micro_batch="auto")
    assert estimate.fitting_rows(long, 257, "cpu", 4, 10**15) == 1


def test_a_number_of_rows_is_taken_as_it_is_and_what_auto_meant_before_is_kept(caplog):
    caplog.set_level("INFO", "gpt")
    where = torch.device("cpu"), torch.float32
    cfg = run_config({"context_length": 32}, 8)
    assert estimate.micro_batch(cfg, 257, *where, {"micro_batch": 3}) == 8 and not caplog.text
    auto = run_config({"context_length": 32}, 8, micro_batch="auto")
    assert estimate.micro_batch(auto, 257, *where, {"micro_batch": 3}) == 3
    assert "3 rows, as before" in caplog.text
    for damaged in (0, -1, "8", True, None):
        assert estimate.micro_batch(auto, 257, *where, {"micro_batch": damaged}) == 8
    assert caplog.text.count("8 of 8 rows at a time") == 5


AUTO = ["train.micro_batch=auto", "train.tokens_per_step=512", "train.sample_every=null", "train.keep_checkpoints=1"]


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """The rows of metrics of one run with micro-batches of 1, 2 and "auto", and the directory of the last."""
    tmp_path = tmp_path_factory.mktemp("curves")
    found = {}
    for micro_batch in ("1", "2", "auto"):
        run_dir = tmp_path / micro_batch
        cfg = settings(tmp_path, *AUTO, "data.tokenizer=bytes", f"train.micro_batch={micro_batch}")
        train(in_directory(cfg, run_dir))
        assert cfg.train.micro_batch == (micro_batch if micro_batch == "auto" else int(micro_batch))
        found[micro_batch] = rows(run_dir)
    return found, tmp_path


def test_the_micro_batch_changes_neither_losses_nor_steps_nor_learning_rates(curves):
    found, _ = curves
    for other in ("1", "2"):
        assert len(found[other]) == len(found["auto"]) == 5
        for mine, its in zip(found["auto"], found[other], strict=True):
            assert (mine["step"], mine["tokens"], mine.get("lr")) == (its["step"], its["tokens"], its.get("lr"))
            for key in ("train/loss", "val/loss", "val/bpb"):
                assert mine.get(key) == pytest.approx(its.get(key), abs=1e-6)


def test_a_resumed_run_takes_the_micro_batch_that_auto_meant_at_its_start(curves, caplog):
    caplog.set_level("INFO", "gpt")
    run_dir = curves[1] / "auto"
    recorded = checkpoint.read_config(run_dir / "checkpoints" / "step_00000004")
    assert (recorded["train"]["micro_batch"], recorded["environment"]["micro_batch"]) == ("auto", 8)
    cfg = settings(curves[1], *AUTO, "data.tokenizer=bytes", "train.max_steps=5")
    train(in_directory(cfg, run_dir))
    assert "8 rows, as before" in caplog.text and "results will differ" not in caplog.text
    assert rows(run_dir)[-1]["step"] == 5


def test_another_number_of_rows_than_auto_meant_is_announced(curves, caplog):
    cfg = settings(curves[1], *AUTO, "data.tokenizer=bytes", "train.max_steps=6", "train.micro_batch=4")
    train(in_directory(cfg, curves[1] / "auto"))
    assert "train.micro_batch was 8: results will differ in the last digits" in caplog.text


def test_time_grows_with_steps_evaluations_and_samples_and_shrinks_with_speed():
    cfg = loaded(*SMALL)
    work, slow = estimate.Work.expected(cfg.train), estimate.Rates(1e9, 1e9, 1e9)

    def seconds(steps=100, rates=slow, **changes):
        changed = replace(cfg, train=replace(cfg.train, **changes))
        return estimate.run_seconds(changed, work, steps, rates, 50257)

    assert seconds(steps=200) > seconds() > seconds(rates=estimate.Rates(2e9, 2e9, 2e9))
    assert seconds(eval_every=1) > seconds() > seconds(sample_every=None)


def test_the_probe_finds_more_than_a_megaflop_per_second_even_where_bfloat16_is_emulated():
    rates = estimate.probe(torch.device("cpu"), torch.bfloat16, 16, 257)
    assert min(vars(rates).values()) > 1e6
