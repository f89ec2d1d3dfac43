"""Whole fine-tuning runs: they start from given weights, train a part of them, resume, and are shared."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from test_conf import loaded
from test_train import TIMING, in_directory

from gpt import loop
from gpt.data import batching, prepared
from gpt.errors import UserError
from gpt.files.jsonl import read_rows
from gpt.machine.machine import Machine
from gpt.objective import NEXT_TOKEN
from gpt.runs import checkpoint
from gpt.runs.checkpoint import Identity
from gpt.weights import loading
from train import train

OPENAI = ROOT / "tests" / "golden" / "tensorflow" / "tiny"
CPU = torch.device("cpu")
SMALL = [
    "model=pretrained", f"init.from={OPENAI}", "data.tokenizer=bytes", "train.tokens_per_step=128", "train.max_steps=4",
    "train.micro_batch=4", "train.eval_every=2", "train.eval_tokens=256", "train.log_every=1", "train.save_every=2",
    "train.sample_every=4", "sample.references=1", "sample.max_new_tokens=4", "device=cpu", "wandb.mode=disabled",
    "optimizer.lr=0.01", "train.dtype=float32",
]  # fmt: skip
METHODS = {
    "full": ["finetune=full", "finetune.layer_decay=0.8"],
    "lora": ["finetune=lora", "finetune.rank=2"],
    "last_blocks": ["finetune=last_blocks", "finetune.n_blocks=1"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind."""
    folder, configs_and_folders = tmp_path_factory.mktemp("finetuning"), {}
    for method, changes in METHODS.items():
        cfg = loaded(*SMALL, *changes, f"data.prepared_dir={folder / 'data'}")
        train(in_directory(cfg, folder / method))
        configs_and_folders[method] = in_directory(cfg, folder / method), folder / method
    return configs_and_folders


def final(run_dir):
    return safetensors.torch.load_file(run_dir / "checkpoints" / "step_00000004" / "model.safetensors")


def test_a_run_begins_with_the_loss_of_the_weights_that_it_is_given(runs):
    cfg, run_dir = runs["full"]
    model = loading.load(str(OPENAI), ROOT, CPU).model
    val_batches = batching.open_batches(prepared.find(cfg.data, ROOT), cfg, 257).validation
    expected = loop.evaluate(model, NEXT_TOKEN, val_batches, Machine(CPU))["val/loss"]
    assert read_rows(run_dir / "metrics.jsonl")[0]["val/loss"] == pytest.approx(expected, abs=1e-6)


def test_training_lowers_the_loss_whatever_part_is_trained(runs):
    for _, run_dir in runs.values():
        rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "val/loss" in row]
        assert rows[-1]["val/loss"] < rows[0]["val/loss"]


def test_only_what_is_trained_differs_from_the_first_weights(runs):
    first = loading.load(str(OPENAI), ROOT, CPU).model.state_dict()
    changed = {
        method: {
            name for name, tensor in final(run_dir).items() if name not in first or not torch.equal(tensor, first[name])
        }
        for method, (_, run_dir) in runs.items()
    }
    assert changed["full"] == first.keys()
    assert changed["lora"] == {f"h.{i}.attn.c_attn.lora_{part}" for i in range(2) for part in "ab"}
    assert changed["last_blocks"] == {name for name in first if name.startswith(("h.1.", "ln_f."))}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_weights_and_rows_without_reading_the_first_weights(runs, tmp_path, method):
    cfg, run_dir = runs[method]
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    train(in_directory(cfg, copy))
    weights, expected = final(copy), final(run_dir)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    rows, theirs = (
        [{key: value for key, value in row.items() if key not in TIMING} for row in read_rows(path / "metrics.jsonl")]
        for path in (copy, run_dir)
    )
    assert rows == theirs
    assert "weights from" not in (copy / "train.log").read_text().split("resuming from")[1]


def test_the_shared_model_is_a_plain_one_and_the_adapters_alone_make_it_of_the_first_weights(runs):
    cfg, run_dir = runs["lora"]
    tokens = torch.randint(257, (2, 16))
    shared = loading.load(str(run_dir / "last_model.pt"), ROOT, CPU).model
    base = loading.load(str(OPENAI), ROOT, CPU).model
    assert (shared(tokens) - base(tokens)).abs().max() > 1e-3
    merged = loading.load(str(run_dir / "adapter"), ROOT, CPU)  # the adapters, with what the run began with
    assert (shared(tokens) - merged.model(tokens)).abs().max() < 1e-5
    assert (merged.template, merged.tokenizer_name, merged.step) == (cfg.data.template, "bytes", 4)
    checkpointed = loading.load(str(run_dir), ROOT, CPU).model
    assert shared.state_dict().keys() == checkpointed.state_dict().keys()
    assert not (runs["full"][1] / "adapter").exists()


def test_checkpoints_say_where_the_first_weights_came_from(runs):
    _, run_dir = runs["last_blocks"]
    settings = json.loads((run_dir / "checkpoints" / "step_00000004" / "config.json").read_text())
    assert settings["init"] == {"from": OPENAI.relative_to(ROOT).as_posix(), "revision": None}
    assert settings["weights"]["about"] == "GPT-2 as OpenAI released it"
    [(name, sha256)] = settings["weights"]["sha256"].items()
    assert name == "model.ckpt.data-00000-of-00001"
    assert sha256 == checkpoint.facts_of(OPENAI / name).sha256


def test_the_optimizer_remembers_nothing_of_what_is_frozen(runs):
    for method, n_trained in (("lora", 2 * 2 * (16 + 48)), ("last_blocks", 12 * 16 * 16 + 13 * 16 + 2 * 16)):
        state = safetensors.torch.load_file(runs[method][1] / "checkpoints" / "step_00000004" / "state.safetensors")
        assert sum(tensor.numel() for tensor in state.values() if tensor.dim()) == 2 * n_trained


def test_samples_stand_beside_the_answers_of_held_out_questions(runs):
    samples = read_rows(runs["full"][1] / "samples.jsonl")
    assert [("reference" in sample) for sample in samples] == [False, False, False, True]


def test_a_run_goes_on_from_another_run_of_the_project(runs, tmp_path):
    _, lora_run = runs["lora"]
    cfg = loaded(
        *[item for item in SMALL if not item.startswith("init.from")], f"init.from={lora_run}", "finetune=full",
        "model.context_length=16", f"data.prepared_dir={lora_run.parent / 'data'}", "train.max_steps=1",
    )  # fmt: skip
    assert cfg.model.context_length == 16 and cfg.model.n_embd == 16
    train(in_directory(cfg, tmp_path / "second"))


@pytest.mark.parametrize(("before", "after"), [("lora", "full"), ("full", "lora"), ("last_blocks", "full")])
def test_a_run_does_not_go_on_with_another_way_of_fine_tuning(runs, tmp_path, before, after):
    shutil.copytree(runs[before][1], tmp_path / "copy")
    with pytest.raises(UserError) as caught:
        train(in_directory(runs[after][0], tmp_path / "copy"))
    assert caught.value.code in (2, 3) and ("finetune.name" in str(caught.value) or "lora.rank" in str(caught.value))


def test_a_checkpoint_of_a_run_with_adapters_names_them(runs):
    identity = checkpoint.verify(runs["lora"][1] / "checkpoints" / "step_00000004").identity
    assert isinstance(identity, Identity) and (identity.lora.rank, identity.lora.targets) == (2, ["attn.c_attn"])
