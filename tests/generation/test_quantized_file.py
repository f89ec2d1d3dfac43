"""A model in int8 or int4 on the disk: what is read back, and what is refused."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ROOT, UNPUBLISHED, model_config, modern_config
from transformers import AutoModelForCausalLM

from gpt import tokenizer
from gpt.config.data import DISCLAIMER
from gpt.errors import UserError
from gpt.files.atomic import sha256
from gpt.generation import packed_model, quantized_file
from gpt.generation.packed_linear import Int4Linear
from gpt.model import GPT
from gpt.modern import Modern
from gpt.runs.model_file import Loaded
from gpt.weights import export
from gpt.weights.locate import find
from gpt.weights.weight_files import read

CPU = torch.device("cpu")
BYTES = tokenizer.load("bytes")
MODELS = {
    "tied": lambda: GPT(model_config(n_embd=64), BYTES.n_vocab),
    "untied": lambda: GPT(model_config(n_embd=48, tie_weights=False), BYTES.n_vocab),
    "unpublished": lambda: Modern(modern_config(**UNPUBLISHED), BYTES.n_vocab),
}


def write(which, name, directory):
    torch.manual_seed(0)
    model = MODELS[which]().eval()
    quantized_file.write(Loaded(model, "bytes", "plain", 7, directory), name, directory)
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantized") / "model"
    write("untied", "int4", directory)
    return directory


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def load(directory, wanted=None):
    return packed_model.load(str(directory), ROOT, CPU, {}, wanted)


def sums(directory):
    """Of files that somebody has changed and signed again."""
    files = [directory / name for name in (quantized_file.CONFIG, quantized_file.WEIGHTS)]
    (directory / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", quantized_file.QUANTIZED)
def test_what_is_written_is_read_back_with_the_same_outputs(which, name, tmp_path):
    model = write(which, name, tmp_path / "model")
    loaded, found = load(tmp_path / "model")
    ids = torch.randint(0, BYTES.n_vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids), model(ids))
        assert torch.equal(loaded.model(ids[:1, :1]), model(ids[:1, :1]))
    assert (found, loaded.step, loaded.template, loaded.tokenizer_name) == (name, 7, "plain", "bytes")
    assert not any(parameter.requires_grad and not parameter.numel() for parameter in loaded.model.parameters())


def test_a_file_takes_the_bits_that_it_says(tmp_path):
    sizes = {}
    for name in quantized_file.QUANTIZED:
        write("untied", name, tmp_path / name)
        tensors = safetensors.torch.load_file(tmp_path / name / quantized_file.WEIGHTS)
        fc = {key: tensor for key, tensor in tensors.items() if key.startswith("h.0.mlp.c_fc.") and "bias" not in key}
        sizes[name] = 8 * sum(tensor.nbytes for tensor in fc.values()) / (4 * 48 * 48)
    # 48 numbers of a row: a scale of 16 bits; or two groups of 32, the second half empty, with 32 bits each.
    assert sizes == {"int8": pytest.approx(8 + 16 / 48), "int4": pytest.approx((4 * 64 + 2 * 32) / 48)}


def test_the_directory_warns_of_what_the_model_writes(original):
    assert DISCLAIMER in (original / "README.md").read_text()


def test_nibbles_are_in_plain_order_with_the_even_code_in_the_low_half(original):
    tensors = safetensors.torch.load_file(original / quantized_file.WEIGHTS)
    torch.manual_seed(0)
    weight = MODELS["untied"]().h[0].attn.c_attn.weight.detach()
    layer = Int4Linear.of(weight)
    nibbles = tensors["h.0.attn.c_attn.nibbles"]
    assert torch.equal(nibbles & 15, layer.codes[:, ::2]) and torch.equal(nibbles >> 4, layer.codes[:, 1::2])


def test_no_other_program_takes_it_for_its_own(original, tmp_path):
    with pytest.raises(ValueError, match=r"gpt_lab_quantized|model type"):
        AutoModelForCausalLM.from_pretrained(original)
    with pytest.raises(UserError, match="a gpt_lab_quantized model, not GPT-2, Llama or Qwen3") as error:
        read(find(str(original), None, ROOT))  # as init.from does
    assert error.value.code == 3


@pytest.mark.parametrize("file", [quantized_file.CONFIG, quantized_file.WEIGHTS])
@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_a_flipped_bit_is_one_line_with_code_3(file, where, directory):
    content = bytearray((directory / file).read_bytes())
    content[int(where * len(content))] ^= 1
    (directory / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(directory)
    assert error.value.code == 3 and "\n" not in str(error.value)


@pytest.mark.parametrize("file", [quantized_file.WEIGHTS, "SHA256SUMS"])
def test_a_file_that_is_missing_is_named(file, directory):
    (directory / file).unlink()
    with pytest.raises(UserError, match=f"{file}: missing") as error:
        load(directory)
    assert error.value.code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, group 32, int4; this version reads format 1"),
        ({"group": 64}, "group 64"),
        ({"precision": "int3"}, "int3"),
        ({"identity": None}, r"config.json damaged \(identity: "),
        ({"step": "seven"}, r"config.json damaged \(step: "),
        ({"step": -1}, r"config.json damaged \(step: "),
    ],
)
def test_a_description_that_is_not_understood_is_refused(change, message, directory):
    path = directory / quantized_file.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    sums(directory)
    with pytest.raises(UserError, match=message) as error:
        load(directory)
    assert error.value.code == 3


def test_a_tokenizer_of_another_size_is_refused(directory):
    path = directory / quantized_file.CONFIG
    content = json.loads(path.read_text())
    content["identity"]["tokenizer"] = "gpt2"
    path.write_text(json.dumps(content))
    sums(directory)
    with pytest.raises(UserError, match="vocabulary 257, its tokenizer gpt2 has 50257") as error:
        load(directory)
    assert error.value.code == 3


def test_sums_that_lack_a_file_verify_nothing_and_are_refused(directory):
    path = directory / "SHA256SUMS"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if quantized_file.WEIGHTS not in line))
    with pytest.raises(UserError, match=f"SHA256SUMS damaged .nothing about {quantized_file.WEIGHTS}") as error:
        load(directory)
    assert error.value.code == 3


def test_another_file_in_the_directory_is_not_taken_for_the_model(directory):
    assert load(directory / quantized_file.WEIGHTS)[1] == load(directory / quantized_file.CONFIG)[1] == "int4"
    with pytest.raises(UserError, match="no such file or directory"):
        load(directory / "typo.pt")


@pytest.mark.parametrize("size", [{"n_layer": 10**6}, {"n_embd": 10**7, "n_head": 1}, {"n_embd": 64}])
def test_a_description_of_another_model_is_refused_before_memory_is_taken(size, directory):
    path = directory / quantized_file.CONFIG
    content = json.loads(path.read_text())
    content["identity"]["model"] |= size
    path.write_text(json.dumps(content))
    sums(directory)
    with pytest.raises(UserError) as error:
        load(directory)
    assert error.value.code == 3 and "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["nan", "type", "more", "fewer"])
def test_tensors_that_do_not_fit_are_named(fault, directory):
    path = directory / quantized_file.WEIGHTS
    tensors = safetensors.torch.load_file(path)
    if fault == "nan":
        tensors["packed_head.grid"][0, 0, 0] = torch.nan
    elif fault == "type":
        tensors["packed_head.grid"] = tensors["packed_head.grid"].float()
    elif fault == "more":
        tensors["packed_head.more"] = torch.zeros(1)
    else:
        del tensors["packed_head.grid"]
    safetensors.torch.save_file(tensors, path)
    sums(directory)
    with pytest.raises(UserError, match=r"tensor '?packed_head\.(grid|more)") as error:
        load(directory)
    assert error.value.code == 3


def test_a_precision_that_the_file_does_not_have_is_refused(original):
    assert load(original, "auto")[1] == load(original, "int4")[1] == load(original, None)[1] == "int4"
    for other in ("int8", "float32"):
        with pytest.raises(UserError, match=f"weights in int4 have no form in {other}") as error:
            load(original, other)
        assert error.value.code == 2


def test_a_device_without_the_operators_is_one_line(original, monkeypatch):
    def lacking(*arguments):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", lacking)
    with pytest.raises(UserError, match=r"precision=int4 is not supported on cpu \(no such operator") as error:
        load(original)
    assert error.value.code == 2 and str(error.value).endswith("; use the model that it was made of")


def test_only_int8_and_int4_are_written_and_nothing_is_replaced(original, tmp_path):
    loaded = Loaded(MODELS["tied"](), "bytes", None, 0, tmp_path)
    with pytest.raises(UserError, match="export in precision=bfloat16"):
        quantized_file.write(loaded, "bfloat16", tmp_path / "new")
    with pytest.raises(UserError, match="would replace"):
        quantized_file.write(loaded, "int8", original)
    assert not (tmp_path / "new").exists()


def test_what_has_fewer_bits_already_is_not_exported_again(original, tmp_path):
    loaded, _ = load(original)
    for write_again in (export.write, lambda loaded, place: quantized_file.write(loaded, "int8", place)):
        with pytest.raises(UserError, match="its weights have fewer bits already") as error:
            write_again(loaded, tmp_path / "new")
        assert error.value.code == 2 and not (tmp_path / "new").exists()
