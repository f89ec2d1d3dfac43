"""Loading a model in a precision."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, adamw_config, model_config

from gpt import lora, optim, tokenizer
from gpt.config.schema import LoRAConfig
from gpt.generation import packed_model
from gpt.generation.packed_linear import Int8Linear
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint, model_file
from gpt.runs.checkpoint import Identity

BYTES = tokenizer.load("bytes")
CPU = torch.device("cpu")
MODEL = model_config(n_embd=64)


@pytest.fixture
def path(tmp_path) -> Path:
    torch.manual_seed(0)
    model_file.save_model(tmp_path / "one.pt", GPT(MODEL, BYTES.n_vocab), Identity(MODEL, 257, "bytes", None), step=3)
    return tmp_path / "one.pt"


def test_a_model_is_loaded_in_the_precision_that_was_asked_for(path):
    for wanted in ("float32", None):
        plain, as_asked = packed_model.load(str(path), ROOT, CPU, {}, wanted)
        assert as_asked == "float32" and plain.model.packed_head is None
    loaded, as_asked = packed_model.load(str(path), ROOT, CPU, {}, "int8")
    assert as_asked == "int8" and isinstance(loaded.model.blocks[0].attn.c_attn, Int8Linear)
    assert (loaded.step, loaded.files, loaded.tokenizer_name) == (3, (path,), "bytes")


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_adapters_of_a_run_are_merged_before_bits_are_taken_away(name, tmp_path):
    torch.manual_seed(0)
    adapters = LoRAConfig(rank=2, alpha=4.0, targets=["attn.c_attn", "mlp.c_fc"])
    model = GPT(MODEL, BYTES.n_vocab).eval()
    lora.add(model, adapters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # B is 0 at first, and changes nothing
    identity = Identity(MODEL, BYTES.n_vocab, "bytes", None, adapters)
    checkpoint.publish(
        tmp_path / "run", model, optim.build(model, adamw_config()), Progress(step=3), identity, {}, keep=1
    )
    loaded, _ = packed_model.load(str(tmp_path / "run"), ROOT, CPU, {}, name)
    ids = torch.randint(0, BYTES.n_vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, got = (own(ids).float().log_softmax(-1) for own in (model, loaded.model))
        without = packed_model.load(str(tmp_path / "run"), ROOT, CPU, {}, "float32")[0].model(ids).log_softmax(-1)
    torch.testing.assert_close(without, wanted, rtol=0, atol=1e-4)
    assert (got - wanted).abs().max() < (0.5 if name == "int4" else 0.05)  # three times what it is
    assert not any("lora" in key for key in loaded.model.state_dict())
