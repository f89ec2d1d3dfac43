"""Estimates of memory against what is counted and measured; the rows that micro_batch=auto chooses."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import group
import pytest
import torch
from conftest import LINEAR, ROOT, finetune_config, run_config
from test_conf import loaded
from test_rank_environment import TORCHRUN
from test_train import in_directory, rows, settings

from gpt.files.jsonl import read_rows
from gpt.machine import free_memory, memory
from gpt.machine.ranks import ALONE, Planned
from gpt.machine.sizes import count_sizes
from gpt.runs import checkpoint
from train import train

GB = 10**9
F32 = torch.float32


MEASURE = """
import json, sys
from conftest import finetune_config, made_split, run_config
import torch
from gpt import finetune, loop, optim
from gpt.machine import device, free_memory
from gpt.machine.machine import Machine
from gpt.objective import NEXT_TOKEN
from gpt.data.batching import TrainBatches
from gpt.model import GPT
device.keep_memory()
for shape, rows, vocab_size, train, chosen in json.loads(sys.argv[1]):
    cfg = run_config(shape, rows, **train)
    cfg.finetune = chosen and finetune_config(**chosen)
    split = made_split([cfg.model.context_length // 2 + 1] * 4 * rows, vocab_size=min(vocab_size, 50000))
    batches = TrainBatches(split, cfg.data, cfg.model.context_length, cfg.train, 0)
    model = GPT(cfg.model, vocab_size).train()
    model.gradient_checkpointing = cfg.train.gradient_checkpointing
    finetune.prepare(model, cfg.finetune, 0)
    optimizer = optim.build(model, cfg.optimizer, cfg.finetune)
    for step in range(2):
        loop.train_step(model, optimizer, NEXT_TOKEN, batches.step(step), Machine(torch.device("cpu")), 1.0)
    print(free_memory.peak())
    del batches, model, optimizer
"""


def peaks(*cases):
    """(measured, estimated) peak memory of a process after each (shape, rows, size of the vocabulary, settings of
    train, what is fine-tuned). Later ones must need more than those before, as all of them run in the same process."""
    cases = [(*case[:4], case[4] and asdict(case[4])) for case in cases]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    estimated = []
    for shape, n_rows, vocab_size, section, chosen in cases:
        cfg = run_config(shape, n_rows, **section)
        cfg.finetune = chosen and finetune_config(**chosen)
        estimated.append(memory.estimate(cfg, vocab_size, n_rows, "cpu", F32).total)
    assert estimated == sorted(estimated)
    return list(zip(map(int, result.stdout.split()), estimated, strict=True))


exhaustive = pytest.mark.exhaustive
MINI = {"context_length": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}
LAST_BLOCK, LORA = finetune_config(name="last_blocks"), finetune_config(name="lora")
ALL_ADAPTERS = finetune_config(name="lora", rank=16, targets=list(LINEAR))


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [
                ({"context_length": 256}, 10, 257, {}, LAST_BLOCK),
                ({"context_length": 256}, 10, 257, {}, LORA),
                ({"context_length": 512, "dropout": 0.1}, 4, 257, {}, None),
            ],
            id="last block, adapters, all with dropout",
            marks=exhaustive,
        ),
        pytest.param([({"context_length": 128}, 4, 50257, {}, None)], id="vocabulary", marks=exhaustive),
        pytest.param([({"context_length": 512}, 16, 257, {}, None)], id="rows", marks=exhaustive),
        pytest.param([({"context_length": 1024, "n_embd": 64}, 2, 50257, {}, None)], id="context", marks=exhaustive),
        *(
            pytest.param([(MINI, 8, 50257, {}, chosen)], id=f"mini, {name}", marks=exhaustive)
            for name, chosen in [("full", None), ("last block", LAST_BLOCK), ("lora", LORA), ("all", ALL_ADAPTERS)]
        ),
    ],
)
def test_the_peak_memory_of_a_process_is_within_15_percent_of_the_estimate(cases, record_property):
    found = peaks(*cases)
    for (*_, chosen), (measured, estimated) in zip(cases, found, strict=True):
        name = f", finetune={chosen.name}" if chosen else ""
        sizes = f"{measured / 1e6:.0f} MB measured, {estimated / 1e6:.0f} MB estimated"
        record_property("count", f"peak memory{name}: {sizes}")
    for measured, estimated in found:
        assert estimated == pytest.approx(measured, rel=0.15)


@exhaustive
def test_adapters_on_gpt2_small_take_less_than_60_percent_of_the_memory_of_full_fine_tuning(record_property):
    small = {"context_length": 256, "n_layer": 12, "n_head": 12, "n_embd": 768}
    adapters = finetune_config(name="lora", rank=16)
    [(lora, said_of_lora), (full, said_of_full)] = [
        peaks((small, 4, 50257, {}, chosen))[0] for chosen in (adapters, finetune_config())
    ]
    record_property("count", f"LoRA rank 16 on small: {lora / 1e9:.2f} GB, full fine-tuning {full / 1e9:.2f} GB")
    assert lora < 0.6 * full and said_of_lora < 0.6 * said_of_full


def test_only_what_is_trained_has_optimizer_state_and_gradients():
    cfg = run_config({"context_length": 16}, 64, micro_batch=1)  # gradients lie beside the activations
    full = memory.estimate(cfg, 50257, 1, "cpu", F32)
    for chosen in (LORA, LAST_BLOCK):
        cfg.finetune = chosen
        trained = count_sizes(cfg.model, chosen, 50257).trained
        frozen = memory.estimate(cfg, 50257, 1, "cpu", F32)
        assert frozen.optimizer == 2 * 4 * trained
        assert full.head - frozen.head == 4 * 50257 * 128  # the gradient of the head
        gradients = 4 * count_sizes(cfg.model, None, 50257).parameters + 4 * 50257 * 128
        assert full.activations_and_gradients - frozen.activations_and_gradients > 0.9 * gradients
        assert frozen.weights - full.weights == (4 * trained if chosen is LORA else 0)
    cfg.finetune = finetune_config()
    assert memory.estimate(cfg, 50257, 1, "cpu", F32) == full
    untied = run_config({"context_length": 16, "tie_weights": False}, 64, micro_batch=1)
    whole = memory.estimate(untied, 50257, 1, "cpu", F32)
    untied.finetune = LAST_BLOCK
    assert memory.estimate(untied, 50257, 1, "cpu", F32).head == whole.head  # a head of its own is trained


def test_memory_grows_with_rows_and_shrinks_with_checkpointing():
    shape = {"context_length": 64}
    totals = [memory.estimate(run_config(shape, 64), 257, n, "cpu", F32).total for n in (8, 16, 32)]
    assert totals == sorted(totals) and len(set(totals)) == 3
    deep, cheaper = (run_config(shape | {"n_layer": 12}, 64, gradient_checkpointing=on) for on in (False, True))
    assert memory.estimate(cheaper, 257, 64, "cpu", F32).total < memory.estimate(deep, 257, 64, "cpu", F32).total


SHAPE = ["model.n_layer=4", "model.n_head=4", "model.n_embd=128"]


def test_ranks_share_the_rows_of_a_step_and_with_fsdp_the_state():
    cfg = loaded(*SHAPE, "model.context_length=64", "train.tokens_per_step=1024", "train.micro_batch=4")
    alone, ddp, fsdp = (
        memory.estimate(cfg, 257, 4, "cpu", F32, ranks) for ranks in (ALONE, Planned(8, False), Planned(8, True))
    )
    two_rows = memory.estimate(replace(cfg, train=replace(cfg.train, tokens_per_step=128)), 257, 2, "cpu", F32)
    assert (alone.exchange, ddp.weights, ddp.optimizer) == (0, alone.weights, alone.optimizer)
    assert ddp.activations_and_gradients == two_rows.activations_and_gradients
    assert (fsdp.weights, fsdp.optimizer) == (alone.weights // 8, alone.optimizer // 8)
    parameters = count_sizes(cfg.model, None, 257).parameters
    gradients = 4 * parameters * memory.GAPS
    assert fsdp.activations_and_gradients < ddp.activations_and_gradients < fsdp.activations_and_gradients + gradients
    copies = 4 * (4 * (257 + 64) * 128 + 2 * (12 * 128 + 9) * 128)  # of embeddings, and two blocks
    assert fsdp.exchange == pytest.approx(copies + memory.FSDP["cpu"], rel=1e-3)
    assert memory.estimate(cfg, 257, 4, "cpu", F32, Planned(1, True)) == alone


@exhaustive
@pytest.mark.parametrize(("parallel", "rows"), [("ddp", 4), ("ddp", 1), ("fsdp", 4), ("fsdp", 1)])
def test_the_peak_memory_of_a_rank_is_within_15_percent_of_the_estimate(tmp_path, parallel, rows, record_property):
    (tmp_path / "text.txt").write_text(" ".join(str(n * n) for n in range(20_000)))
    typed = [
        "model=mini", "model.dropout=0.0", "data=text", f"data.path={tmp_path / 'text.txt'}", "device=cpu",
        f"data.prepared_dir={tmp_path / 'data'}", "train.max_steps=2", "train.log_every=1", "train.sample_every=null",
        "train.dtype=float32", f"train.micro_batch={rows}", "train.eval_tokens=256", f"parallel={parallel}",
    ]  # fmt: skip
    code, output = group.run(2, "train.py", *typed, f"out_dir={tmp_path / 'run'}")
    assert code == 0, output
    measured = 1e9 * read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["memory_gb"]
    estimated = memory.estimate(loaded(*typed), 50257, rows, "cpu", F32, Planned(2, parallel == "fsdp")).total
    sizes = f"{measured / 1e6:.0f} MB measured, {estimated / 1e6:.0f} MB estimated"
    record_property("count", f"peak memory of one of 2 ranks, {parallel}, {rows} rows at a time: {sizes}")
    assert estimated == pytest.approx(measured, rel=0.15)


def test_no_more_rows_are_chosen_than_the_rank_with_most_of_them_has():
    cfg = loaded(*SHAPE, "model.context_length=32", "train.tokens_per_step=1536", "train.micro_batch=auto")
    found = [memory.fitting_rows(cfg, 257, "cpu", F32, 1000 * GB, Planned(n, False)) for n in (1, 2, 5, 48, 49)]
    assert found == [32, 16, 8, 1, 1]  # of 48, 24, 10, 1 and 1


def test_gradients_that_are_copied_for_other_ranks_count_where_activations_take_less():
    cfg = loaded(*SHAPE, "model.context_length=16", "model.n_embd=512", "train.tokens_per_step=32")
    estimate = memory.estimate(cfg, 257, 1, "cpu", F32, Planned(2, False))
    copies = estimate.activations_and_gradients + estimate.head + estimate.exchange
    assert copies == 8 * count_sizes(cfg.model, None, 257).trained and estimate.exchange > 0


def test_ranks_on_one_cpu_have_equal_parts_of_its_free_memory(monkeypatch):
    where = torch.device("cpu")
    in_use = free_memory.in_use(where)
    alone = memory.available(where) - in_use
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert memory.available(where) - in_use == pytest.approx(alone / 4, rel=0.2)


def test_as_many_rows_are_chosen_as_fit_a_power_of_two():
    cfg = run_config({"context_length": 32}, 8, tokens_per_step=32 * 48, micro_batch="auto")
    need = {n: memory.estimate(cfg, 257, n, "cpu", F32).total for n in (1, 2, 4, 8, 16, 32)}
    assert all(memory.fitting_rows(cfg, 257, "cpu", F32, total) == n for n, total in need.items())
    assert all(memory.fitting_rows(cfg, 257, "cpu", F32, total - 1) == n // 2 for n, total in need.items() if n > 1)
    assert memory.fitting_rows(cfg, 257, "cpu", F32, 0) == 1  # then it is tried all the same
    assert memory.fitting_rows(cfg, 257, "cpu", F32, 1000 * GB) == 32  # of the 48 of a step


def test_no_more_rows_are_chosen_than_make_a_step_faster():
    cfg = run_config({"context_length": 512}, 8, tokens_per_step=2**20, micro_batch="auto")
    for kind, tokens in memory.USEFUL_TOKENS.items():
        assert memory.fitting_rows(cfg, 257, kind, F32, 10**15) * 512 == tokens
    long = run_config({"context_length": 2**20}, 1, tokens_per_step=2**20, micro_batch="auto")
    assert memory.fitting_rows(long, 257, "cpu", F32, 10**15) == 1


def test_a_number_of_rows_is_taken_as_it_is_and_what_auto_meant_before_is_kept(caplog):
    caplog.set_level("INFO", "gpt")
    where = torch.device("cpu"), torch.float32
    cfg = run_config({"context_length": 32}, 8)
    assert memory.micro_batch(cfg, 257, *where, {"micro_batch": 3}) == 8 and not caplog.text
    auto = run_config({"context_length": 32}, 8, micro_batch="auto")
    assert memory.micro_batch(auto, 257, *where, {"micro_batch": 3}) == 3
    assert "3 rows, as before" in caplog.text
    for damaged in (0, -1, "8", True, None):
        assert memory.micro_batch(auto, 257, *where, {"micro_batch": damaged}) == 8
    assert caplog.text.count("8 of 8 rows at a time") == 5


AUTO = [
    "train.micro_batch=auto", "train.tokens_per_step=512", "train.sample_every=null", "train.keep_checkpoints=1",
    "train.dtype=float32",
]  # fmt: skip


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
            for key in {"train/loss", "val/loss", "val/bpb"} & mine.keys():
                # The same sums in another order: within 8 units of float32's precision, 1.2e-7 of the value.
                assert mine[key] == pytest.approx(its[key], rel=8 * torch.finfo(torch.float32).eps, abs=0)
            assert mine.keys() == its.keys()


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
