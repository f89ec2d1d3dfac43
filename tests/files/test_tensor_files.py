"""Tensors in files: what does not fit is named, what is no file of tensors is refused."""

import pytest
import safetensors.torch
import torch
from conftest import model_config

from gpt.errors import UserError
from gpt.files import tensor_files
from gpt.model import GPT


def test_weights_come_back_as_they_were(tmp_path):
    model = GPT(model_config(), 50)
    safetensors.torch.save_file(tensor_files.weights_of(model), tmp_path / "w")
    other = GPT(model_config(), 50)
    tensor_files.load_weights(other, tensor_files.read_safetensors(tmp_path / "w"), tmp_path / "w")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("wpe.weight"), r"tensor wpe.weight: missing in the file, \[16, 16\] float32 in the model"),
        (lambda w: w.update(extra=torch.ones(2)), r"tensor extra: \[2\] float32 in the file, missing in the model"),
        (lambda w: w.update({"wpe.weight": torch.ones(16, 16, dtype=torch.int64)}), r"\[16, 16\] int64 in the file"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    model = GPT(model_config(), 50)
    weights = tensor_files.weights_of(model)
    change(weights)
    with pytest.raises(UserError, match=message) as caught:
        tensor_files.load_weights(model, weights, tmp_path / "w")
    assert caught.value.code == 3


@pytest.mark.parametrize("read", [tensor_files.read_safetensors, tensor_files.read_torch])
@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, b"\x08" + bytes(7) + b"{}", None])
def test_what_is_no_file_of_tensors_is_refused(tmp_path, read, content):
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.code == 3 and "\n" not in str(caught.value)
