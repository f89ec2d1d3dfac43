"""A model as a Hugging Face directory, read by transformers itself and by what llama.cpp's converter is made of."""

import contextlib
import errno
import io
import json
import random
import re
import shutil
import socket
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, model_config
from safetensors import safe_open
from tracing import NEEDS_SPACE, full_disk, trace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2LMHeadModel

from gpt import lora, sampling, tokenizer
from gpt.config.schema import LoRAConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.prompts import format_prompt
from gpt.runs.model_file import Loaded
from gpt.weights import export, loading

GPT2 = tokenizer.load("gpt2")
SHAPES = {
    "tied": model_config(context_length=64),
    "untied": model_config(context_length=32, tie_weights=False, dropout=0.25),
    "exact": model_config(context_length=24, n_layer=1, n_head=4, gelu="exact"),
}


def loaded(shape="tied", name="gpt2", vocab_size=GPT2.n_vocab):
    """A model whose attention is far from uniform, and whose logits are of the size of trained ones."""
    model = GPT(SHAPES[shape], vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1).add_(0.1 * torch.randn_like(parameter))
    return Loaded(model, name, "alpaca", 7, Path("/somewhere/model.pth"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """shape -> (our model, its directory)"""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "empty").mkdir()
    directories = {"tied": folder / "new", "untied": folder / "empty", "exact": folder / "not" / "there"}
    torch.manual_seed(0)
    models = {shape: loaded(shape) for shape in SHAPES}
    for shape, mine in models.items():
        export.write(mine, directories[shape])
    return {shape: (mine.model, directories[shape]) for shape, mine in models.items()}


@pytest.fixture(params=SHAPES)
def exported(request, exports):
    return exports[request.param]


@pytest.fixture
def directory(exports):
    return exports["tied"][1]


@pytest.fixture(scope="module")
def their_tokenizer(exports):
    return AutoTokenizer.from_pretrained(exports["tied"][1])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not tried


def greedy(model, ids, number):
    """What our own sampler goes on with."""
    draws = sampling.Draws(number, GPT2.eos, temperature=0, top_k=None, top_p=None)
    return sampling.generate(model, ids, draws, num_samples=1, seed=0)[0]


def test_transformers_computes_the_same_logits_and_writes_the_same_greedy_text(exported, their_tokenizer):
    ours, directory = exported
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is GPT2LMHeadModel and theirs.dtype == torch.float32 and not theirs.training
    tokens = torch.randint(GPT2.n_vocab, (2, ours.config.context_length))
    with torch.inference_mode():
        expected, found = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for prompt in ("Every effort moves you", "### Response:\n", " 你好 🙂"):
        ids = GPT2.encode(prompt)
        expected = greedy(ours, ids, 12)
        found = theirs.generate(**their_tokenizer(prompt, return_tensors="pt"), max_new_tokens=12)[0].tolist()
        assert found == ids + expected and len(set(expected)) > 1
        assert their_tokenizer.decode(expected) == GPT2.decode(expected)


def test_the_files_are_as_transformers_itself_writes_them(exported, tmp_path):
    _, directory = exported
    GPT2LMHeadModel.from_pretrained(directory).save_pretrained(tmp_path)
    found = []
    for path in (directory, tmp_path):
        with safe_open(path / "model.safetensors", "pt") as file:
            found.append(({name: file.get_tensor(name) for name in file.keys()}, file.metadata()))  # noqa: SIM118
    (ours, metadata), (theirs, their_metadata) = found
    assert ours.keys() == theirs.keys() and metadata == their_metadata == {"format": "pt"}
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path))
    assert ours.pop("torch_dtype") == theirs["dtype"]  # its name in transformers 4
    assert ours.items() <= theirs.items()


def test_what_is_exported_is_read_back_bit_for_bit(exported):
    ours, directory = exported
    again = loading.load(str(directory), ROOT, torch.device("cpu"))
    assert again.tokenizer_name == "gpt2"
    assert again.model.config.gelu == ours.config.gelu and again.model.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.model.state_dict().items())


def test_dropout_and_the_form_of_gelu_are_those_of_the_model(exported):
    ours, directory = exported
    config = AutoConfig.from_pretrained(directory)
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == ours.config.dropout
    assert config.activation_function == {"tanh": "gelu_new", "exact": "gelu"}[ours.config.gelu]
    assert config.tie_word_embeddings == ours.config.tie_weights


TEXTS = [
    "", "Hello, I am", "Every effort moves you", "\n\n### Response:\n", "  two  spaces   three\t\ttabs \n \n\n  end  ",
    "What is (are) Glaucoma ?", "I've we'll they're it's DON'T 'tis", "naïve café Ærøskøbing", "Привет, мир! 12 345,67",
    "你好，世界。こんにちは 한국어",  # noqa: RUF001
    "🙂👩‍👩‍👧‍👦 🏳️‍🌈 é\u200d\ufeff", "\x00\x01\x7f\x85\xa0\u2028\u3000",
    "def f(x):\n    return x ** 2  # x²\n",
]  # fmt: skip


def made_up_texts(number):
    rng = random.Random(0)
    pieces = [
        *"aZ09 '!?.,\n\t\r-é日я🙂",
        "  ",
        "\n\n",
        "'s",
        "'ll",
        " the",
        "<|",
        "endoftext",
        "\u00a0",
        "\u2003",
        "e\u0301",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(number)]


def without(directory, name, target):
    shutil.copytree(directory, target, dirs_exist_ok=True)
    (target / name).unlink()
    return target


def test_its_tokenizer_gives_the_ids_of_tiktoken_and_gets_the_text_back(directory, their_tokenizer, tmp_path):
    """From tokenizer.json, and from vocab.json and merges.txt: some libraries take the one, some the two."""
    older = AutoTokenizer.from_pretrained(without(directory, "tokenizer.json", tmp_path))
    for tokens in (their_tokenizer, older):
        assert tokens.bos_token_id == tokens.eos_token_id == tokens.unk_token_id == 50256
        assert (len(tokens), tokens.model_max_length) == (50257, 64)
        for text in TEXTS + made_up_texts(200):
            ids = GPT2.encode(text)
            assert tokens(text)["input_ids"] == ids, repr(text)
            assert tokens.decode(ids) == text
        assert tokens("a 🙂 b")["input_ids"] == tokens.encode("a 🙂 b")  # nothing is added at either end
    ours, theirs = (json.loads(each.backend_tokenizer.to_str()) for each in (their_tokenizer, older))
    assert ours["model"] == theirs["model"]
    offsets = [each("a 🙂 b", return_offsets_mapping=True)["offset_mapping"] for each in (their_tokenizer, older)]
    assert offsets[0] == offsets[1]


def test_the_end_of_a_text_is_a_control_token_unless_special_tokens_are_to_be_split(their_tokenizer):
    tokens, text = their_tokenizer, "a <|endoftext|>"
    assert tokens(text)["input_ids"] == [*GPT2.encode("a "), 50256]
    assert tokens(text, split_special_tokens=True)["input_ids"] == GPT2.encode(text)
    assert tokens.decode([64, 50256], skip_special_tokens=True) == "a"


def test_the_example_in_the_card_runs_and_prints_what_our_own_sampler_does(exports, monkeypatch):
    ours, directory = exports["tied"]
    program = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(directory)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(program, {})
    ids = GPT2.encode(format_prompt("alpaca", "Every effort moves you"))
    assert output.getvalue() == GPT2.decode(greedy(ours, ids, 64 - len(ids))) + "\n"


def test_generation_is_greedy_and_ends_with_the_text(directory):
    config = GenerationConfig.from_pretrained(directory)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id, config.do_sample) == (50256,) * 3 + (False,)


def test_sums_of_all_files_are_as_sha256sum_reads_them(directory):
    lines = (directory / "SHA256SUMS").read_text().splitlines()
    names = {path.name for path in directory.iterdir()} - {"SHA256SUMS"}
    assert {line.split("  ")[1] for line in lines} == names and len(lines) == len(names) == 8
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=directory, check=True)


# What the table of names in llama.cpp's own package has for a GPT-2 of this project. Its converter (conversion/gpt2.py
# and base.py there) asks for: the class in `architectures`; n_layer, n_ctx, n_embd, n_head, layer_norm_epsilon in the
# configuration that AutoConfig reads, and an MLP of 4 n_embd; weights in model*.safetensors; a name in this table for
# each tensor; (in, out) matrices, which it turns; no id of a token from vocab_size on; merges, and the end of a text.
BLOCKS = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
TURNED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def test_llama_cpp_finds_a_place_for_each_tensor_in_its_own_orientation(exported):
    ours, directory = exported
    d, context, config = ours.config.n_embd, ours.config.context_length, ours.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    assert [path.name for path in directory.glob("model*.safetensors*")] == ["model.safetensors"]
    shapes = {}
    with safe_open(directory / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.dtype == np.float32
            shapes[names.get_name(name, try_suffixes=(".weight", ".bias"))] = (
                tensor.shape[::-1] if name.endswith(TURNED) else tensor.shape
            )
    wanted = {"token_embd.weight": (GPT2.n_vocab, d), "position_embd.weight": (context, d)}
    wanted |= {"output_norm.weight": (d,), "output_norm.bias": (d,)}
    wanted |= {} if config.tie_weights else {"output.weight": (GPT2.n_vocab, d)}
    rows = dict(zip(BLOCKS, ((d,), (3 * d, d), (d, d), (d,), (4 * d, d), (d, 4 * d)), strict=True))
    for layer in range(config.n_layer):
        for name, shape in rows.items():
            wanted |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
    assert shapes == wanted


def test_llama_cpp_finds_the_settings_that_it_asks_for(exported):
    ours, directory = exported
    c, found = ours.config, AutoConfig.from_pretrained(directory).to_dict()
    assert found["architectures"][0] == "GPT2LMHeadModel"
    keys = ("n_layer", "n_ctx", "n_embd", "n_head", "vocab_size", "layer_norm_epsilon", "n_inner")
    expected = (c.n_layer, c.context_length, c.n_embd, c.n_head, GPT2.n_vocab, 1e-5, None)
    assert tuple(found[key] for key in keys) == expected


def test_llama_cpp_finds_merges_and_the_end_of_a_text(directory, their_tokenizer):
    found = gguf.SpecialVocab(directory, load_merges=True, n_vocab=GPT2.n_vocab)
    assert len(found.merges) == 50_000 and found.merges[0] == "Ġ t"
    assert {found.special_token_ids[kind] for kind in ("bos", "eos")} == {50256}
    assert not any(found.add_special_token.values())  # a prompt is not begun with one, as it was not in training
    assert sorted(their_tokenizer.get_vocab().values()) == list(range(GPT2.n_vocab))
    assert gguf.Metadata.load(None, directory).license == "other"  # of the card


def refused(mine, directory, code=2):
    with pytest.raises(UserError) as caught:
        export.write(mine, directory)
    assert caught.value.code == code
    assert not list(directory.parent.glob(".*.new"))
    return str(caught.value)


def test_a_model_without_a_counterpart_is_refused_with_the_reason(tmp_path):
    message = refused(loaded(name="bytes", vocab_size=257), tmp_path / "x")
    assert "its tokenizer is bytes" in message and "data.tokenizer=gpt2" in message
    assert "vocabulary 300, its tokenizer gpt2 has 50257" in refused(loaded(vocab_size=300), tmp_path / "x")
    adapted = loaded()
    lora.add(adapted.model, LoRAConfig(2, 4.0, ["attn.c_attn"]))
    assert "it has weights that its class has not" in refused(adapted, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refused(loaded(), tmp_path)
    assert "would replace what is there" in message and str(tmp_path) in message
    refused(loaded(), tmp_path / "file")
    refused(loaded(), Path("/"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_where_nothing_can_be_written_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(loaded(), tmp_path / "file" / "x", code=5)
    message = refused(loaded(), tmp_path / ("x" * 252), code=5)
    assert "not written: File name too long (needs 3." in message and str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_directories_that_are_empty_or_not_there_yet_are_filled_and_nothing_stays_beside_them(exports):
    """As the fixture has made them."""
    folders = [directory.parent for _, directory in exports.values()]
    assert [path.name for folder in set(folders) for path in folder.glob(".*")] == []
    assert all((directory / "SHA256SUMS").is_file() for _, directory in exports.values())


def fail_at(number):
    """Only this operation finds the disk full."""
    return lambda operation: errno.ENOSPC if operation.number == number else None


@pytest.fixture
def traced(tmp_path):
    """decide -> how an export to tmp_path / "x" goes."""
    mine = loaded("exact")
    return lambda *decide: trace(lambda: export.write(mine, tmp_path / "x"), tmp_path, *decide)


def fails(traced, tmp_path, operation, decide):
    outcome = traced(decide)
    assert outcome.code == 5 and "error: x not written: disk full (needs 3." in outcome.output, outcome.output
    assert not list(tmp_path.iterdir()), f"{operation} leaves something"


def test_everything_is_on_the_disk_before_it_has_its_name_and_a_full_disk_leaves_nothing(traced, tmp_path):
    operations = traced().operations
    done = [(operation.name, operation.path) for operation in operations]
    published = done.index(("rename", ".x.new -> x"))
    for path in (tmp_path / "x").iterdir():
        name = f".x.new/{path.name}"  # safetensors writes under a name of its own and renames
        is_written = [
            (kind == "write" and what == name) or (kind == "rename" and what.endswith(name)) for kind, what in done
        ]
        written = max(i for i, here in enumerate(is_written) if here)
        assert written < done.index(("fsync", name)) < published
    assert done.index(("fsync", ".x.new")) < published < done.index(("fsync", "."))
    shutil.rmtree(tmp_path / "x")
    chosen = [("mkdir", ".x.new"), ("write", ".x.new/vocab.json"), ("fsync", ".x.new/SHA256SUMS")]
    for what, decide in zip(chosen, (full_disk, fail_at, full_disk), strict=True):
        fails(traced, tmp_path, what, decide(operations[done.index(what)].number))


@pytest.mark.exhaustive
def test_a_disk_that_is_full_at_any_write_leaves_nothing_behind(traced, tmp_path, record_property):
    operations = [op for op in traced().operations if op.name in NEEDS_SPACE and op.path != "."]
    shutil.rmtree(tmp_path / "x")
    n_failed = 0
    for operation in operations:
        for decide in (full_disk, fail_at):
            fails(traced, tmp_path, operation, decide(operation.number))
            n_failed += 1
    assert n_failed >= 40
    record_property("count", f"ENOSPC at each of {len(operations)} writes of an export, alone and with all after it: "
                             f"{n_failed} refused, 0 files left")  # fmt: skip
