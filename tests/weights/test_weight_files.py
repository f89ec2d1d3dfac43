"""Files of weights as other projects write them: recognised, read, and refused in one line where they are not whole."""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from test_hostile_files import Payload
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.errors import UserError
from gpt.weights import locate, weight_files

GOLDEN = ROOT / "tests" / "golden" / "tensorflow"
N_VOCAB = 257  # that of our tokenizer of bytes
SMALL = {"n_embd": 16, "n_head": 1}


def theirs(**changes: Any) -> GPT2LMHeadModel:
    """transformers' model with random weights, in which nothing is as it would be without: norms, biases, attention.
    Heads are 64 wide, as in all sizes of GPT-2, so that files which do not say how many there are can be read."""
    config = {"vocab_size": N_VOCAB, "n_positions": 32, "n_embd": 128, "n_layer": 2, "n_head": 2} | changes
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=256, eos_token_id=256)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


# Other projects' names for transformers' weights, as these projects have them: written here once more, apart from
# gpt/weights/tensor_names.py, so that the two can be compared.


def plain(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Without "transformer.", as in OpenAI's own repositories on the hub."""
    return {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}


def as_book(model: GPT2LMHeadModel, qkv_bias: bool = True, masks: bool = True) -> dict[str, Tensor]:
    """Raschka, "Build a Large Language Model (From Scratch)", chapters 4 and 5: the head is a matrix of its own."""
    t, T, found = plain(model), model.config.n_positions, OrderedDict()
    found["tok_emb.weight"], found["pos_emb.weight"] = t["wte.weight"], t["wpe.weight"]
    for i in range(model.config.n_layer):
        theirs, block = f"h.{i}", f"trf_blocks.{i}"
        for k, name in enumerate(["W_query", "W_key", "W_value"]):
            found[f"{block}.att.{name}.weight"] = t[f"{theirs}.attn.c_attn.weight"].chunk(3, dim=1)[k].T.clone()
            if qkv_bias:
                found[f"{block}.att.{name}.bias"] = t[f"{theirs}.attn.c_attn.bias"].chunk(3)[k].clone()
        if masks:
            found[f"{block}.att.mask"] = torch.triu(torch.ones(T, T), diagonal=1)
        for book, name in (("att.out_proj", "attn.c_proj"), ("ff.layers.0", "mlp.c_fc"), ("ff.layers.2", "mlp.c_proj")):
            found[f"{block}.{book}.weight"] = t[f"{theirs}.{name}.weight"].T.contiguous()
            found[f"{block}.{book}.bias"] = t[f"{theirs}.{name}.bias"]
        for book, name in (("norm1", "ln_1"), ("norm2", "ln_2")):
            found[f"{block}.{book}.scale"] = t[f"{theirs}.{name}.weight"]
            found[f"{block}.{book}.shift"] = t[f"{theirs}.{name}.bias"]
    found["final_norm.scale"], found["final_norm.shift"] = t["ln_f.weight"], t["ln_f.bias"]
    found["out_head.weight"] = t["lm_head.weight"].clone()
    return found


def as_nanogpt(model: GPT2LMHeadModel, prefix: str = "", bias: bool = True) -> dict[str, Any]:
    """What nanoGPT's train.py saves as ckpt.pt: https://github.com/karpathy/nanoGPT."""
    turned = [".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight"]
    found = OrderedDict()
    for name, tensor in model.state_dict().items():
        if bias or not name.endswith(".bias"):
            found[prefix + name] = tensor.T.contiguous() if any(name.endswith(end) for end in turned) else tensor
    c = model.config
    shape = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    return {
        "model": found,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "model_args": {**shape, "block_size": c.n_positions, "bias": bias, "vocab_size": c.vocab_size, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {
            "out_dir": "out-shakespeare-char", "eval_interval": 250, "eval_iters": 200, "log_interval": 10,
            "eval_only": False, "always_save_checkpoint": False, "init_from": "scratch", "wandb_log": False,
            "wandb_project": "shakespeare-char", "wandb_run_name": "mini-gpt", "dataset": "shakespeare_char",
            "gradient_accumulation_steps": 1, "batch_size": 64, "block_size": c.n_positions, **shape, "dropout": 0.2,
            "bias": bias, "learning_rate": 1e-3, "max_iters": 5000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99,
            "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 100, "lr_decay_iters": 5000, "min_lr": 1e-4,
            "backend": "nccl", "device": "cuda", "dtype": "bfloat16", "compile": True,
        },
    }  # fmt: skip


def save_directory(model: GPT2LMHeadModel, folder: Path, tensors: dict[str, Tensor], n_files: int = 1) -> Path:
    """As older versions of transformers save: config.json and pytorch_model.bin, or several of these and an index."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    if n_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    files = {name: f"pytorch_model-{i % n_files + 1:05d}-of-{n_files:05d}.bin" for i, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        torch.save({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def with_buffers(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """As in openai-community/gpt2 on the hub: the mask of each layer is a tensor too."""
    T, found = model.config.n_positions, {}
    for name, tensor in plain(model).items():
        found[name] = tensor
        if name.endswith("ln_1.bias"):
            block = name.removesuffix(".ln_1.bias")
            found[f"{block}.attn.bias"] = torch.ones(T, T, dtype=torch.uint8).tril().view(1, 1, T, T)
            found[f"{block}.attn.masked_bias"] = torch.tensor(-1e4)
    del found["lm_head.weight"]
    return found


def saved(model: GPT2LMHeadModel, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


def to_file(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def alone(model: GPT2LMHeadModel, path: Path) -> Path:
    """One file of safetensors without any configuration beside it."""
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in plain(model).items()}, path)
    return path


# format -> what writes a model in it below a folder, and returns what `init.from` would name
FORMATS: dict[str, Callable[[GPT2LMHeadModel, Path], Path]] = {
    "transformers": lambda m, f: saved(m, f / "hf"),
    "transformers in shards": lambda m, f: saved(m, f / "hf", max_shard_size="400KB"),
    "pytorch_model.bin": lambda m, f: save_directory(m, f / "bin", m.state_dict()),
    "pytorch_model.bin with masks": lambda m, f: save_directory(m, f / "bin", with_buffers(m)),
    "pytorch_model.bin in shards": lambda m, f: save_directory(m, f / "bin", m.state_dict(), n_files=3),
    "state dict of transformers": lambda m, f: to_file(m.state_dict(), f / "fine_tuned.pth"),
    "safetensors alone": lambda m, f: alone(m, f / "gpt2.safetensors"),
    "book": lambda m, f: to_file(as_book(m), f / "gpt2_small_trained.pth"),
    "book without masks": lambda m, f: to_file(as_book(m, masks=False), f / "last_model.pt"),
    "book, model_state_dict": lambda m, f: to_file(
        {"model_state_dict": as_book(m), "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3}]}},
        f / "model_and_optimizer.pth",
    ),
    "book, state_dict": lambda m, f: to_file({"state_dict": as_book(m), "epoch": 3}, f / "model.pth"),
    "book, compiled": lambda m, f: to_file(prefixed(as_book(m), "_orig_mod."), f / "model.pth"),
    "book, data parallel": lambda m, f: to_file(prefixed(as_book(m), "module."), f / "model.pth"),
}


@cache
def model() -> GPT2LMHeadModel:
    return theirs()


@cache
def small() -> GPT2LMHeadModel:
    """Whose files are so small that they can be damaged in hundreds of places."""
    return theirs(**SMALL, n_layer=1, n_positions=8)


def read(path: Path) -> weight_files.Weights:
    return weight_files.read(locate.find(str(path), None, ROOT))


def values(found: weight_files.Weights) -> dict[str, Tensor]:
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in found.tensors.items()}


def refused(path: Path, code: int = 3) -> UserError:
    """The error for a file of weights: of one line and with the code."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.code == code and "\n" not in str(caught.value), str(caught.value)
    return caught.value


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def ours(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """transformers' weights under our names, and (out, in)."""
    is_matrix = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight").fullmatch
    return {name: tensor.T if is_matrix(name) else tensor for name, tensor in plain(model).items()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_numbers_under_our_names(tmp_path, name):
    found = read(FORMATS[name](model(), tmp_path))
    expected = ours(model())
    if "lm_head.weight" not in found.tensors:
        del expected["lm_head.weight"]  # tied, and not written twice
    assert equal(values(found), expected)
    a = found.architecture
    assert (a.n_layer, a.n_head, a.n_embd, a.context_length, a.vocab_size) == (2, 2, 128, 32, N_VOCAB)
    assert a.tie_weights and a.gelu == "tanh" and found.identity is None


def of_tensorflow() -> GPT2LMHeadModel:
    """transformers' model with the numbers of the fixture: the bytes of its variables lie one after the other, in the
    order of their names, and have the sha256 of what TensorFlow has read back."""
    folder, found = GOLDEN / "tiny", {}
    raw = np.fromfile(folder / "model.ckpt.data-00000-of-00001", "<f4")
    for name, facts in sorted(json.loads((GOLDEN / "expected.json").read_text())["tiny"].items()):
        value, raw = np.split(raw, [math.prod(facts["shape"])])
        assert hashlib.sha256(value.tobytes()).hexdigest() == facts["sha256"]
        words = re.sub(r"^h(\d+)/", r"h/\1/", name.removeprefix("model/"))
        words = re.sub(r"/[wg]$|(?<=^w[tp]e)$", "/weight", re.sub(r"/b$", "/bias", words))
        tensor = torch.from_numpy(value).view(facts["shape"])
        found[f"transformer.{words.replace('/', '.')}"] = tensor[0] if tensor.dim() == 3 else tensor
    assert not len(raw)
    n = json.loads((folder / "hparams.json").read_text())
    sizes = {"n_embd": n["n_embd"], "n_layer": n["n_layer"], "n_head": n["n_head"]}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=n["n_vocab"], n_positions=n["n_ctx"], **sizes)).eval()
    model.load_state_dict(found | {"lm_head.weight": found["transformer.wte.weight"]})
    return model


def test_openais_files_give_the_numbers_that_tensorflow_wrote():
    found, expected = read(GOLDEN / "tiny"), ours(of_tensorflow())
    del expected["lm_head.weight"]
    assert found.about == "GPT-2 as OpenAI released it" and equal(values(found), expected)
    a = found.architecture
    assert (a.n_layer, a.n_head, a.n_embd, a.context_length, a.vocab_size) == (2, 2, 16, 32, N_VOCAB)
    assert (a.tie_weights, a.gelu) == (True, "tanh")


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_is_read_whatever_else_is_in_it(tmp_path, prefix, bias):
    found = read(to_file(as_nanogpt(model(), prefix, bias), tmp_path / "ckpt.pt"))
    assert found.about == "GPT-2 as nanoGPT has it" + (prefix and f", its names without their prefix {prefix}")
    assert equal(values(found), {n: t for n, t in ours(model()).items() if bias or not n.endswith(".bias")})
    a = found.architecture
    assert (a.n_layer, a.n_head, a.n_embd, a.context_length, a.vocab_size) == (2, 2, 128, 32, N_VOCAB)
    assert a.tie_weights and a.gelu == "exact" and "n_head" in a.stated


def test_the_number_of_heads_is_what_the_file_says(tmp_path):
    content = as_nanogpt(model())
    content["model_args"]["n_head"] = content["config"]["n_head"] = 8
    assert read(to_file(content, tmp_path / "ckpt.pt")).architecture.n_head == 8
    content = {"model_state_dict": as_book(model()), "cfg": {"emb_dim": 128, "n_heads": 4, "qkv_bias": True}}
    assert read(to_file(content, tmp_path / "book.pth")).architecture.n_head == 4


def test_a_head_of_its_own_is_told_from_a_tied_one(tmp_path):
    untied = theirs(tie_word_embeddings=False)
    assert not read(to_file(as_book(untied), tmp_path / "book.pth")).architecture.tie_weights
    assert not read(to_file(as_nanogpt(untied), tmp_path / "ckpt.pt")).architecture.tie_weights
    assert not read(saved(untied, tmp_path / "hf")).architecture.tie_weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_read_as_they_are(tmp_path, dtype):
    path = saved(theirs().to(dtype), tmp_path / "hf")
    assert {parts[0].dtype for parts in read(path).tensors.values()} == {dtype}


# What is damaged


def every_bit_of(content: bytes, n: int, seed: int) -> list[int]:
    """Places of n bits, spread over all of a file."""
    rng = random.Random(seed)
    size = 8 * len(content) / n
    return [min(int(i * size + rng.random() * size), 8 * len(content) - 1) for i in range(n)]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", ["fine_tuned.pth", "ckpt.pt", "pytorch_model.bin"])
def test_no_bit_of_a_file_of_torch_flips_without_being_noticed(tmp_path, name, record_property):
    write = {
        "fine_tuned.pth": lambda: to_file(as_book(small()), tmp_path / name),
        "ckpt.pt": lambda: to_file(as_nanogpt(small()), tmp_path / name),
        "pytorch_model.bin": lambda: save_directory(small(), tmp_path / "hf", small().state_dict()) / name,
    }
    path = write[name]()
    content, expected, refusals, named, harmless = path.read_bytes(), values(read(path)), 0, 0, 0
    for bit in every_bit_of(content, 150, seed=1):
        path.write_bytes(flipped(content, bit))
        try:
            assert equal(values(read(path)), expected), f"bit {bit} flipped unnoticed"
            harmless += 1  # of the time of a file in the archive, or of what fills up a gap
        except UserError as error:
            assert error.code == 3 and "\n" not in str(error), f"bit {bit}: {error}"
            refusals += 1
            named += "crc32 differs" in str(error)
    assert refusals + harmless == 150 and named > 75
    text = f"{refusals} refused, {named} of them naming the crc32, {harmless} in bytes that mean nothing"
    record_property("count", f"150 bits flipped in {name}: {text}, 0 loaded wrongly")


def test_a_flipped_bit_in_any_member_of_a_file_of_torch_names_the_member_and_its_crc32(tmp_path, record_property):
    path = to_file(as_book(small()), tmp_path / "fine_tuned.pth")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [entry for entry in archive.infolist() if entry.file_size]
        starts = {}
        for entry in members:
            with archive.open(entry) as file:
                starts[entry.filename] = archive.fp.seekable() and file._orig_compress_start
    for entry in members:
        place = starts[entry.filename] + entry.file_size // 2
        path.write_bytes(flipped(content, 8 * place))
        assert f"{entry.filename}: crc32 differs" in refused(path).what
    record_property("count", f"{len(members)} members of fine_tuned.pth damaged: each named with its crc32")


@pytest.mark.parametrize("name", ["fine_tuned.pth", "model.safetensors", "shard", "pytorch_model.bin"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, name, record_property):
    write = {
        "fine_tuned.pth": lambda: to_file(as_book(small()), tmp_path / name),
        "model.safetensors": lambda: saved(small(), tmp_path / "hf") / name,
        "shard": lambda: sorted(saved(small(), tmp_path / "hf", max_shard_size="10KB").glob("model-*"))[1],
        "pytorch_model.bin": lambda: save_directory(small(), tmp_path / "hf", small().state_dict()) / name,
    }
    path = write[name]()
    content = path.read_bytes()
    sizes = [0, 1, 7, 8, 100, len(content) // 2, len(content) - 4096, len(content) - 1]
    for size in sizes:
        path.write_bytes(content[:size])
        assert path.name in refused(path if name == "fine_tuned.pth" else path.parent).what
    record_property("count", f"{name} cut off at {len(sizes)} places: {len(sizes)} refused")


@pytest.mark.parametrize("n_files", [1, 3])
def test_the_sha256_of_safetensors_is_compared_where_a_list_of_them_is_beside(tmp_path, n_files, record_property):
    folder = saved(small(), tmp_path / "hf", **({} if n_files == 1 else {"max_shard_size": "10KB"}))
    files = sorted(folder.glob("model*.safetensors"))
    assert len(files) >= n_files
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
    expected, n = values(read(folder)), 0
    for path in files:
        content = path.read_bytes()
        for bit in every_bit_of(content, 10, seed=2):
            path.write_bytes(flipped(content, bit))
            error = refused(folder)
            assert path.name in error.what and "sha256 is not that of SHA256SUMS" in error.what
            n += 1
        path.write_bytes(content)
    assert equal(values(read(folder)), expected)
    record_property("count", f"{n} bits flipped in {len(files)} safetensors with SHA256SUMS: {n} refused")


def test_a_file_of_safetensors_alone_is_compared_with_the_list_too(tmp_path):
    path = alone(small(), tmp_path / "gpt2.safetensors")
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()} *{path.name}\n")
    read(path)
    path.write_bytes(flipped(path.read_bytes(), 8 * (path.stat().st_size - 100)))
    assert "sha256 is not that of SHA256SUMS" in refused(path).what
    (tmp_path / "SHA256SUMS").write_text("of other files, or no list at all\n")
    read(path)


def test_a_flipped_bit_in_openais_files_names_the_crc32c(tmp_path, record_property):
    folder = shutil.copytree(GOLDEN / "tiny", tmp_path / "124M")
    n = 0
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        path = folder / name
        content = path.read_bytes()
        for bit in every_bit_of(content[:-48], 25, seed=3):  # the last 48 bytes of the index say where its parts are
            path.write_bytes(flipped(content, bit))
            error = refused(folder)
            assert name in error.what and "crc32c" in error.what
            n += 1
        for size in (0, 10, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            assert name in refused(folder).what
        path.write_bytes(content)
    record_property("count", f"{n} bits flipped in OpenAI's files: {n} refused, the crc32c named")


# What is missing, or elsewhere


def shards_of(folder: Path) -> Path:
    return saved(small(), folder / "hf", max_shard_size="10KB")


def test_a_shard_that_is_missing_is_named_with_the_file_that_names_it(tmp_path):
    folder = shards_of(tmp_path)
    gone = sorted(folder.glob("model-*"))[1]
    gone.unlink()
    error = refused(folder)
    assert error.what == f"shard {gone.name} is missing" and "model.safetensors.index.json" in error.remedy


@pytest.mark.parametrize("elsewhere", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 5, None, ["x"]])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, elsewhere):
    folder = shards_of(tmp_path)
    shutil.copy(next(folder.glob("model-*")), tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = elsewhere
    index.write_text(json.dumps(content))
    assert "no weight_map of tensors to files beside it" in refused(folder).what


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 300, "a\0b", "\x1b[31m", "nothing.safetensors"])
def test_an_index_that_names_what_can_be_no_file_is_refused(tmp_path, name):
    folder = shards_of(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = name
    index.write_text(json.dumps(content))
    assert "\x1b" not in str(refused(folder))


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    folder = shards_of(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder)


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path):
    folder = shards_of(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.h.0.extra"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert "tensor transformer.h.0.extra is in none of its" in refused(folder).what


def test_a_directory_with_a_configuration_and_no_weights_says_which_files_it_lacks(tmp_path):
    small().config.save_pretrained(tmp_path)
    assert refused(tmp_path).what == "neither model.safetensors nor pytorch_model.bin"
    (tmp_path / "tf").mkdir()
    shutil.copy(GOLDEN / "tiny" / "hparams.json", tmp_path / "tf")
    assert "model.ckpt.index" in str(refused(tmp_path / "tf"))


# What is no file of weights, or would have to be executed


class Module(nn.Module):
    """A whole model in a file: its class would be imported and called."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(4, 4)


NEED_CODE = {
    "a whole module": (lambda tensors: Module(), "test_weight_files.Module"),
    "arguments": (lambda tensors: {"model": tensors, "args": argparse.Namespace(lr=1.0)}, "argparse.Namespace"),
    "a number of numpy's": (lambda tensors: {"model": tensors, "loss": np.float64(1.5)}, "numpy"),
    "a path": (lambda tensors: {"model": tensors, "config": {"out_dir": Path("x")}}, "pathlib"),
}


@pytest.mark.parametrize("name", NEED_CODE)
@pytest.mark.parametrize("where", ["weights.pth", "pytorch_model.bin"])
def test_a_pickle_that_needs_code_is_refused_with_the_class_and_the_conversion(tmp_path, name, where):
    make, named = NEED_CODE[name]
    small().config.save_pretrained(tmp_path)
    path = to_file(make(as_book(small())), tmp_path / where)
    error = refused(path if where == "weights.pth" else tmp_path)
    assert named in error.what and where in error.what
    assert "torch.save(model.state_dict(), 'weights.pth')" in error.remedy
    assert "weights_only" not in str(error)


@pytest.mark.parametrize("forced", [None, "1"])
@pytest.mark.parametrize("place", ["bare", "beside", "among"])
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, forced, place):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    payload, tensors = Payload(tmp_path / "executed"), as_book(small())
    content = {
        "bare": payload, "beside": {"model": tensors, "optimizer": payload}, "among": {**tensors, "x": payload}
    }[place]  # fmt: skip
    path = to_file(content, tmp_path / "weights.pth")
    error = refused(path)
    assert "mkdir" in error.what and "weights_only" not in str(error) and not (tmp_path / "executed").exists()
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "the payload does nothing, and the test proves nothing"


@pytest.mark.parametrize("content", [as_book, lambda m: Payload(Path("/nowhere/at/all"))], ids=["weights", "code"])
def test_a_file_of_a_torch_before_1_6_is_refused_as_such(tmp_path, content):
    path = tmp_path / "old.pth"
    torch.save(content(small()), path, _use_new_zipfile_serialization=False)
    assert "torch before 1.6" in refused(path).what


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"


@pytest.mark.parametrize(
    "content", [PNG, HTML, POINTER, b"", b"\0" * 1000], ids=["png", "html", "lfs", "empty", "zeros"]
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.png", "model.safetensors", "pytorch_model.bin"])
def test_other_files_are_refused(tmp_path, name, content):
    small().config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert name in error.what
    if content in (HTML, POINTER) and not name.endswith(".png"):
        assert ("git lfs pull" if content == POINTER else "download the file itself") in error.remedy


@pytest.mark.parametrize(
    "content",
    [None, 5, [1, 2], {}, {"a": 1}, {0: torch.ones(2)}, torch.ones(3), {"model": {}}, {"state_dict": {"x": 1}}],
    ids=repr,
)
def test_a_file_without_tensors_that_have_names_is_refused(tmp_path, content):
    assert "no tensors with names in it" in refused(to_file(content, tmp_path / "x.pth")).what


def test_weights_under_any_key_are_taken_where_no_other_has_some_and_settings_may_stand_in_others(tmp_path):
    weights, more = as_book(small()), {"optimizer": {"state": {}}, "epoch": 3}
    path = to_file(
        {"ema": weights, "hyper_parameters": {"lr": 1, "config": {"n_heads": 2}}, **more}, tmp_path / "x.pth"
    )
    architecture = read(path).architecture
    assert architecture.n_head == 2 and architecture.stated == ("n_head",)
    error = refused(to_file({"net": weights, "ema": weights, **more}, tmp_path / "y.pth"))
    assert error.what == "weights under several keys, net, ema" and "state_dict of the model alone" in error.remedy
    assert refused(to_file(more, tmp_path / "z.pth")).what.endswith("; its keys are optimizer, epoch")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-*.safetensors"])
def test_a_shard_or_its_index_stands_for_the_directory(tmp_path, name):
    folder = shards_of(tmp_path)
    source = locate.find(str(next(folder.glob(name))), None, tmp_path)
    assert (source.path, source.kind) == (folder, "transformers")


def test_another_network_is_refused_with_some_of_its_tensors(tmp_path):
    path = to_file(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    assert "no GPT-2 in a layout that is known; its tensors are weight, bias" in refused(path).what


def other(tensors: dict[str, Tensor], make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return tensors | {"trf_blocks.0.ff.layers.0.weight": make(tensors["trf_blocks.0.ff.layers.0.weight"])}


EXTRAORDINARY = {
    "integers": (lambda t: t.to(torch.int64), "int64, and no floating-point numbers"),
    "bytes": (lambda t: t.to(torch.uint8), "uint8, and no floating-point numbers"),
    "complex": (lambda t: t.to(torch.complex64), "complex64, and no floating-point numbers"),
    "sparse": (lambda t: t.to_sparse(), "no ordinary one"),
    "compressed": (lambda t: t.to_sparse_csr(), "no ordinary one"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "no ordinary one"),
    "expanded": (lambda t: torch.zeros(1).expand(10**6, 10**6), "no ordinary one"),
    "expanded a little": (lambda t: torch.zeros(1, t.shape[1]).expand(t.shape), "no ordinary one"),
    "nowhere": (lambda t: t.to("meta"), "no ordinary one"),
}


@pytest.mark.filterwarnings("ignore")  # about sparse and quantised tensors
@pytest.mark.parametrize("name", EXTRAORDINARY)
def test_tensors_of_other_kinds_and_those_that_claim_more_than_they_have_are_refused(tmp_path, name):
    make, reason = EXTRAORDINARY[name]
    path = to_file(other(as_book(small()), make), tmp_path / "x.pth")
    assert path.stat().st_size < 10**6
    error = refused(path)
    assert "trf_blocks.0.ff.layers.0.weight" in error.what and reason in error.what


@pytest.mark.parametrize("key", ["moe", "n_kv_head", "rope"])
def test_a_variant_of_nanogpt_is_refused_with_what_is_different(tmp_path, key):
    content = as_nanogpt(small())
    content["model_args"][key] = 3
    assert f"a variant of nanoGPT: {key}=3" in refused(to_file(content, tmp_path / "ckpt.pt")).what


def test_a_tied_model_of_which_safetensors_kept_the_heads_name_only_is_read(tmp_path):
    tied = model()
    safetensors.torch.save_model(tied, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys() and "transformer.wte.weight" not in file.keys()  # noqa: SIM118
    found = read(tmp_path / "a.safetensors")
    expected = {name: tensor for name, tensor in ours(tied).items() if name != "lm_head.weight"}
    assert equal(values(found), expected) and found.architecture.tie_weights


def test_a_bare_dict_of_nanogpts_has_exact_gelu_and_one_of_this_projects_or_an_untied_one_has_not(tmp_path):
    tensors = as_nanogpt(model())["model"]
    own = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    untied = tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}
    gelus = [read(to_file(t, tmp_path / "x.pt")).architecture.gelu for t in (tensors, own, untied)]
    assert gelus == ["exact", "tanh", "tanh"]


@pytest.mark.parametrize(("width", "n_head"), [(16, 1), (96, 1), (128, 2), (200, 2), (320, 5), (768, 12)])
def test_heads_that_no_file_tells_divide_the_width(tmp_path, width, n_head):
    tensors = plain(theirs(n_embd=width, n_head=1, n_layer=1, n_positions=8))
    assert read(to_file(tensors, tmp_path / "x.pt")).architecture.n_head == n_head


@pytest.mark.parametrize("change", [{"wte.weight": torch.ones(3)}, {"wpe.weight": torch.tensor(1.0)}])
def test_embeddings_that_are_no_matrices_are_refused(tmp_path, change):
    tensors = {name: tensor for name, tensor in (plain(small()) | change).items() if tensor is not None}
    assert "no embeddings of tokens and positions" in refused(to_file(tensors, tmp_path / "x.pth")).what


def test_names_from_a_file_reach_no_terminal_as_they_are(tmp_path):
    path = to_file({"\x1b[31mred": torch.ones(2)}, tmp_path / "x.pth")
    assert "\x1b" not in str(refused(path))


def test_hashes_are_those_of_the_files(tmp_path):
    folder = shards_of(tmp_path)
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("model-*.safetensors")}
    assert read(folder).hashes() == expected and len(expected) > 1


def test_nothing_is_copied_to_be_compared():
    a = torch.randn(10_000, 3)
    assert weight_files.same((a,), (a.clone(),)) and not weight_files.same((a,), (a + 1,))
    assert not weight_files.same((a,), (a[1:],))
