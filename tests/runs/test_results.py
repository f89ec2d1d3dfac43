"""What is written at the end of a run."""

import pytest
import torch
from conftest import ROOT
from test_conf import loaded

from gpt import finetune, tokenizer
from gpt.errors import UserError
from gpt.files.jsonl import RowFile
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import results
from gpt.runs.run import Run
from gpt.weights import loading

SMALL = ["model.n_layer=1", "model.n_head=2", "model.n_embd=8", "model.context_length=8", "data.tokenizer=bytes"]


def write(run_dir, *changes):
    """Of a run of no steps."""
    run_dir.mkdir(exist_ok=True)
    cfg = loaded(*SMALL, *changes)
    model = GPT(cfg.model, 257)
    finetune.prepare(model, cfg.finetune, seed=0)
    meta = {
        "splits": {"train": {"documents": 1, "tokens": 2}},
        "fingerprint": "f",
        "tokenizer": "bytes",
        "n_vocab": 257,
    }
    row = {"step": 0, "tokens": 0, "val/loss": 5.5, "val/perplexity": 244.7}
    RowFile(run_dir / "metrics.jsonl").append([row])
    results.write(Run(cfg, run_dir, None, tokenizer.load("bytes")), model, Progress(), meta)
    return model


def test_there_are_a_model_to_share_a_figure_and_a_card(tmp_path):
    model = write(tmp_path)
    shared = loading.load(str(tmp_path / results.LAST_MODEL), ROOT, torch.device("cpu"))
    assert all(torch.equal(tensor, shared.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss 5.5000" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "adapter").exists()


def test_adapters_are_there_alone_and_within_the_shared_model(tmp_path):
    model = write(tmp_path, "finetune=lora", "finetune.rank=2")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    shared = loading.load(str(tmp_path / results.LAST_MODEL), ROOT, torch.device("cpu")).model
    assert shared.n_parameters() == model.n_parameters() - 2 * (8 + 24)
    assert f"| parameters | {shared.n_parameters():,} |" in (tmp_path / "README.md").read_text()


def test_a_model_that_cannot_be_written_is_an_error_of_the_environment(tmp_path):
    (tmp_path / results.LAST_MODEL).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        write(tmp_path)
    assert caught.value.code == 5
