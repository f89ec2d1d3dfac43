"""Loading a model in a precision."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, model_config

from gpt import tokenizer
from gpt.generation import loading
from gpt.generation.packed_linear import Int8Linear
from gpt.model import GPT
from gpt.runs import model_file
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
    plain, as_asked = loading.load(str(path), ROOT, CPU, {}, "float32")
    assert as_asked == "float32" and plain.model.packed_head is None
    loaded, as_asked = loading.load(str(path), ROOT, CPU, {}, "int8")
    assert as_asked == "int8" and isinstance(loaded.model.blocks[0].attn.c_attn, Int8Linear)
    assert (loaded.step, loaded.files, loaded.tokenizer_name) == (3, (path,), "bytes")
