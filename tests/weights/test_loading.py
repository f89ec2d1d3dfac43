"""First weights: a model filled from a file computes what transformers computes with it, or is refused in one line."""

import dataclasses
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, adamw_config, model_config
from test_weight_files import (
    FORMATS,
    GOLDEN,
    N_VOCAB,
    SMALL,
    alone,
    as_book,
    as_nanogpt,
    flipped,
    model,
    of_tensorflow,
    ours,
    plain,
    saved,
    small,
    theirs,
    to_file,
)
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt import lora, optim
from gpt.config.families import ModelConfig
from gpt.config.schema import InitConfig, LoRAConfig
from gpt.errors import UserError
from gpt.files.tensor_files import describe
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint, model_file
from gpt.runs.checkpoint import Identity
from gpt.weights import loading

CPU = torch.device("cpu")
SHAPE = model_config(n_embd=128, context_length=32)  # of test_weights.model
TINY = model_config(n_layer=1, n_head=1, n_embd=16, context_length=8)  # of test_weights.small


def load(path: Path) -> GPT:
    return loading.load(str(path), ROOT, CPU).model


def build(path: Path, cfg: ModelConfig = SHAPE, n_vocab: int = N_VOCAB, named: str = "bytes") -> GPT:
    """As a run gets it with init.from."""
    first = loading.find(InitConfig(**{"from": str(path), "revision": None}), cfg, named, ROOT)
    return loading.build(cfg, n_vocab, first).eval()


def refused(path: Path, cfg: ModelConfig | None = TINY, code: int = 3, **how: Any) -> UserError:
    """The error for weights that are to be a model's first, or, without `cfg`, the model: one line, with the code."""
    with pytest.raises(UserError) as caught:
        build(path, cfg, **how) if cfg else load(path)
    assert caught.value.code == code and "\n" not in str(caught.value), str(caught.value)
    return caught.value


@torch.no_grad()
def distance(mine: GPT, reference: GPT2LMHeadModel) -> float:
    """The largest difference of any logit, in whole contexts."""
    tokens = torch.randint(N_VOCAB, (3, mine.config.context_length), generator=torch.Generator().manual_seed(1))
    expected = reference.float()(tokens).logits
    assert expected.std() > 0.5, "nothing would be compared"
    return float((mine(tokens)[..., :N_VOCAB] - expected[..., :N_VOCAB]).abs().max())


def without(reference: GPT2LMHeadModel, ends: tuple[str, ...]) -> GPT2LMHeadModel:
    """Some biases are 0, which is what a model without them is."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(ends):
                parameter.zero_()
    return reference


def in_half(dtype: torch.dtype) -> Callable[[Path], tuple[GPT2LMHeadModel, Path]]:
    def make(folder: Path) -> tuple[GPT2LMHeadModel, Path]:
        reference = theirs().to(dtype)
        return reference, saved(reference, folder / "hf")

    return make


def nanogpt(bias: bool, prefix: str = "") -> Callable[[Path], tuple[GPT2LMHeadModel, Path]]:
    def make(folder: Path) -> tuple[GPT2LMHeadModel, Path]:
        reference = theirs(activation_function="gelu")  # nanoGPT's nn.GELU() is the exact one
        reference = reference if bias else without(reference, (".bias",))
        return reference, to_file(as_nanogpt(reference, prefix, bias), folder / "ckpt.pt")

    return make


def no_qkv_bias(folder: Path) -> tuple[GPT2LMHeadModel, Path]:
    reference = without(theirs(), ("c_attn.bias",))
    return reference, to_file(as_book(reference, qkv_bias=False), folder / "model.pth")


def own_head(write: Callable[[GPT2LMHeadModel, Path], Path]) -> Callable[[Path], tuple[GPT2LMHeadModel, Path]]:
    def make(folder: Path) -> tuple[GPT2LMHeadModel, Path]:
        reference = theirs(tie_word_embeddings=False)
        return reference, write(reference, folder)

    return make


# what -> what makes transformers' model and a file of the same weights
CASES: dict[str, Callable[[Path], tuple[GPT2LMHeadModel, Path]]] = {
    **{name: lambda folder, write=write: (model(), write(model(), folder)) for name, write in FORMATS.items()},
    "transformers, untied": own_head(lambda m, f: saved(m, f / "hf")),
    "transformers, exact GELU": lambda f: (m := theirs(activation_function="gelu"), saved(m, f / "hf")),
    "transformers, float16": in_half(torch.float16),
    "transformers, bfloat16": in_half(torch.bfloat16),
    "transformers, float64": in_half(torch.float64),
    "book, untied": own_head(lambda m, f: to_file(as_book(m), f / "model.pth")),
    "book, qkv_bias=False": no_qkv_bias,
    "nanoGPT": nanogpt(bias=True),
    "nanoGPT, compiled": nanogpt(bias=True, prefix="_orig_mod."),
    "nanoGPT, bias=False": nanogpt(bias=False),
    "OpenAI": lambda f: (of_tensorflow(), GOLDEN / "tiny"),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, name, record_property):
    reference, path = CASES[name](tmp_path)
    mine = load(path)
    assert not mine.training and {p.dtype for p in mine.parameters()} == {torch.float32}
    difference = distance(mine, reference)
    assert difference < 1e-5
    c = reference.config
    gelu = "exact" if c.activation_function == "gelu" else "tanh"
    shape = model_config(
        n_embd=c.n_embd, context_length=c.n_positions, tie_weights=c.tie_word_embeddings, gelu=gelu, dropout=0.1
    )
    assert distance(build(path, shape), reference) == difference
    record_property("count", f"parity of {name}: logits differ from transformers' by at most {difference:.0e}")


# Our own


def as_ours(reference: GPT2LMHeadModel) -> GPT:
    mine = GPT(SHAPE, N_VOCAB)
    tensors = ours(reference)
    del tensors["lm_head.weight"]
    mine.load_state_dict(tensors)
    return mine


def published(run_dir: Path, mine: GPT, cfg: LoRAConfig | None = None) -> Path:
    identity = Identity(mine.config, N_VOCAB, "bytes", "alpaca", cfg)
    optimizer = optim.build(mine, adamw_config())
    progress = Progress(step=7, tokens=70, best=9.0, best_step=0)
    path = checkpoint.publish(run_dir, mine, optimizer, progress, identity, {"seed": 1}, keep=2)
    model_file.save_model(run_dir / "last_model.pt", mine, identity, 7)
    return path


@pytest.mark.parametrize("what", ["run", "checkpoint", "model.safetensors", "last_model.pt"])
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "with adapters"])
def test_what_a_run_leaves_has_the_logits_that_transformers_has(tmp_path, what, adapters):
    reference, mine, cfg = theirs(), as_ours(model()), None
    if adapters:
        cfg = LoRAConfig(4, 8, ["attn.c_attn", "mlp.c_proj"])
        lora.add(mine, cfg, seed=1)
        with torch.no_grad():
            for name, tensor in lora.adapters(mine).items():
                tensor.normal_(0, 0.1)
                if name.endswith("lora_b"):
                    layer = reference.transformer.get_submodule(name.removesuffix(".lora_b"))
                    a = mine.state_dict()[f"{name[:-1]}a"]
                    layer.weight += 2 * (tensor @ a).T  # alpha / rank; lora_a comes first
        assert distance(as_ours(model()), reference) > 0.01
    path = published(tmp_path, mine, cfg)
    named = {"run": tmp_path, "checkpoint": path, "last_model.pt": tmp_path / what}.get(what, path / what)
    loaded = loading.load(str(named), ROOT, CPU)
    assert distance(loaded.model, reference) < 1e-5
    assert (loaded.step, loaded.tokenizer_name, loaded.template) == (7, "bytes", "alpaca")
    assert distance(build(named), reference) < 1e-5


def test_where_weights_come_from_is_recorded(tmp_path):
    path = alone(model(), tmp_path / "gpt2.safetensors")
    origin = loading.find(InitConfig(**{"from": str(path), "revision": None}), SHAPE, "bytes", ROOT).origin
    sha256 = checkpoint.facts_of(path).sha256
    assert origin["from"] == str(path) and origin["sha256"] == {"gpt2.safetensors": sha256}
    assert loading.find(InitConfig(**{"from": None, "revision": None}), SHAPE, "bytes", ROOT) is None
    assert loading.build(SHAPE, N_VOCAB, None).n_parameters() == model().num_parameters()


# What is not quite the same


@pytest.mark.parametrize("name", ["transformers", "book", "pytorch_model.bin with masks"])
def test_a_shorter_context_computes_the_same_as_the_long_one(tmp_path, name):
    path = FORMATS[name](model(), tmp_path)
    short = build(path, dataclasses.replace(SHAPE, context_length=10))
    assert short.wpe.weight.shape == (10, 128) and distance(short, model()) < 1e-5


@pytest.mark.parametrize("name", ["transformers", "book"])
def test_a_longer_context_is_refused_with_both_numbers_and_code_2(tmp_path, name):
    path = FORMATS[name](model(), tmp_path)
    error = refused(path, dataclasses.replace(SHAPE, context_length=33), code=2)
    assert "model.context_length 33 is longer than the 32 of the weights" in error.what
    assert "model.context_length=32" in error.remedy


def padded(vocab_size: int, **changes: Any) -> GPT2LMHeadModel:
    return theirs(vocab_size=vocab_size, **SMALL, n_layer=1, n_positions=8, **changes)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("write", [lambda m, f: saved(m, f / "hf"), lambda m, f: to_file(as_nanogpt(m), f / "ckpt.pt")])
def test_the_padding_of_an_embedding_is_left_out(tmp_path, tied, write, caplog):
    reference = padded(320, tie_word_embeddings=tied)
    with caplog.at_level(logging.INFO):
        mine = build(write(reference, tmp_path), dataclasses.replace(TINY, tie_weights=tied, gelu="tanh"))
    assert mine.wte.weight.shape == (N_VOCAB, 16) and distance(mine, reference) < 1e-5
    assert "63 rows of the embedding are beyond the vocabulary" in caplog.text


def test_nanogpts_50304_tokens_are_gpt2s_50257(tmp_path):
    reference = padded(50304, activation_function="gelu")
    loaded = loading.load(str(to_file(as_nanogpt(reference), tmp_path / "ckpt.pt")), ROOT, CPU)
    assert (loaded.tokenizer_name, loaded.model.vocab_size) == ("gpt2", 50257)
    assert distance(loaded.model, reference) < 1e-5


def test_a_tied_file_becomes_an_untied_model_whose_head_begins_as_the_embedding(tmp_path):
    mine = build(FORMATS["transformers"](model(), tmp_path), dataclasses.replace(SHAPE, tie_weights=False))
    assert torch.equal(mine.lm_head.weight, mine.wte.weight)
    assert mine.lm_head.weight.data_ptr() != mine.wte.weight.data_ptr() and distance(mine, model()) < 1e-5


def test_an_untied_file_becomes_no_tied_model_but_says_how_to_have_it(tmp_path):
    path = to_file(as_book(theirs(tie_word_embeddings=False)), tmp_path / "model.pth")
    error = refused(path, SHAPE)
    assert f"lm_head.weight [{N_VOCAB}, 128]" in error.what and "model.tie_weights=false" in error.remedy


# What does not fit


@pytest.mark.parametrize("size", [100, 256, 1281, 50257])
def test_another_size_of_the_vocabulary_is_refused_with_both_numbers(tmp_path, size):
    error = refused(saved(padded(size), tmp_path / "hf"))
    assert error.what == f"a vocabulary of {size:,} tokens in the file, {N_VOCAB} in the tokenizer"


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_another_tokenizer_is_refused(tmp_path, file):
    folder = saved(padded(50257), tmp_path / "hf")
    encoder = {token: number for number, token in enumerate(map(str, range(50257)))}
    (folder / file).write_text(json.dumps(encoder if file == "vocab.json" else {"model": {"vocab": encoder}}))
    error = refused(folder, named="gpt2", n_vocab=50257)
    assert "another vocabulary than that of gpt2" in error.what and error.where == str(folder / file)
    if file == "vocab.json":  # else the other tokenizer is the one to use
        assert refused(folder, None).what == error.what


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"model": 5}', '{"model": {"vocab": [1]}}', "[" * 10**5])
@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, file, content):
    folder = saved(padded(50257), tmp_path / "hf")
    (folder / file).write_text(content)
    refused(folder, named="gpt2", n_vocab=50257)


def changed(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = plain(small())
    change(tensors)
    return tensors


DIFFERENCES = {
    "missing": (
        lambda t: t.pop("h.0.mlp.c_fc.weight"),
        "GPT-2 as transformers has it, but without h.0.mlp.c_fc.weight",
    ),
    "a bias missing": (
        lambda t: t.pop("h.0.mlp.c_fc.bias"),
        "tensor h.0.mlp.c_fc.bias: missing in the file, [64] in the model",
    ),
    "narrow": (
        lambda t: t.update({"h.0.mlp.c_fc.weight": torch.ones(16, 63)}),
        "tensor h.0.mlp.c_fc.weight: [63, 16] in the file, [64, 16] in the model",
    ),
    "a number": (
        lambda t: t.update({"ln_f.bias": torch.tensor(1.0)}),
        "tensor ln_f.bias: [] in the file, [16] in the model",
    ),
    "extra": (
        lambda t: t.update({"score.weight": torch.ones(2, 16), "h.0.ls_1.gamma": torch.ones(16)}),
        "2 tensors that the model has no place for: score.weight [2, 16], h.0.ls_1.gamma [16]",
    ),
    "many extra": (
        lambda t: t.update({f"x{i}": torch.ones(i) for i in range(1, 9)}),
        "8 tensors that the model has no place for: x1 [1], x2 [2], x3 [3], x4 [4], x5 [5] and 3 more",
    ),
    "twice": (
        lambda t: t.update({"transformer.wte.weight": t["wte.weight"] + 1}),
        "1 tensor that the model has no place for: transformer.wte.weight [257, 16]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_first_tensor_that_differs_is_named_with_both_shapes(tmp_path, name, kind):
    change, expected = DIFFERENCES[name]
    small().config.save_pretrained(tmp_path)
    file = "weights.pth" if kind == "file" else "pytorch_model.bin"
    path = to_file(changed(change), tmp_path / file)
    assert refused(path if kind == "file" else tmp_path).what == expected
    assert refused(path if kind == "file" else tmp_path, None).what == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_embd": 32}, "tensor wte.weight: [257, 128] in the file, [257, 32] in the model"),
        ({"n_embd": 32, "context_length": 64}, "tensor wte.weight: [257, 128] in the file, [257, 32] in the model"),
        ({"n_layer": 3}, "tensor h.2.ln_1.weight: missing in the file, [128] in the model"),
        ({"n_layer": 1}, "12 tensors that the model has no place for: h.1.ln_1.weight [128], "),
        ({"n_head": 4}, "n_head 2 in the file, 4 in model.n_head"),
        ({"gelu": "exact"}, "gelu tanh in the file, exact in model.gelu"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_and_told_how_to_be_had(tmp_path, change, expected):
    error = refused(FORMATS["transformers"](model(), tmp_path), dataclasses.replace(SHAPE, **change))
    assert error.what.startswith(expected) and "model=pretrained" in error.remedy


def test_heads_that_a_file_does_not_tell_are_said_with_the_key_and_given_by_it(tmp_path, caplog):
    their_model = theirs(n_embd=16, n_head=2, n_layer=1, n_positions=8)
    with torch.no_grad():
        their_model.transformer.h[0].attn.c_attn.weight.mul_(50)  # else attention hardly depends on the heads
    path = to_file(plain(their_model), tmp_path / "x.pth")
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected = their_model(tokens).logits
        assert not torch.allclose(loading.load(str(path), ROOT, CPU).model(tokens), expected, atol=1e-3)
        assert "x.pth does not say how many heads: 1 of 16 numbers; if not, set model.n_head=..." in caplog.text
        caplog.clear()
        loaded = loading.load(str(path), ROOT, CPU, {"n_head": 2, "gelu": None})
        assert torch.allclose(loaded.model(tokens), expected, atol=1e-4) and "how many heads" not in caplog.text


@pytest.mark.parametrize(
    ("given", "what"),
    [({"n_head": 3}, "not a model that can be"), ({"gelu": "exact"}, "gelu tanh in the file, exact in model.gelu"),
     ({"n_head": 4}, "n_head 2 in the file, 4 in model.n_head")],
)  # fmt: skip
def test_what_is_given_against_the_file_is_refused(tmp_path, given, what):
    path = FORMATS["transformers"](model(), tmp_path)
    with pytest.raises(UserError, match=what) as caught:
        loading.load(str(path), ROOT, CPU, given)
    assert caught.value.code == 3 and "model=pretrained" not in caught.value.remedy


def test_more_layers_than_there_are_tensors_cost_neither_memory_nor_time(tmp_path):
    refused(FORMATS["book"](model(), tmp_path), dataclasses.replace(SHAPE, n_layer=10**9))


def book_with(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = as_book(small())
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("shape", "found"),
    [((16, 8), "[[16, 16], [16, 8], [16, 16]]"), ((), "[[16, 16], [], [16, 16]]"), ((15, 16), "[47, 16]")],
    ids=str,
)
def test_queries_keys_and_values_of_different_shapes_are_refused(tmp_path, shape, found):
    tensors = as_book(small()) | {"trf_blocks.0.att.W_key.weight": torch.ones(shape)}
    error = refused(to_file(tensors, tmp_path / "x.pth"))
    assert error.what == f"tensor h.0.attn.c_attn.weight: {found} in the file, [48, 16] in the model"


@pytest.mark.parametrize("gone", ["W_query.weight", "W_key.weight", "W_value.weight", "W_query.bias"])
def test_a_third_of_a_projection_that_is_missing_is_damage(tmp_path, gone):
    tensors = as_book(small())
    del tensors[f"trf_blocks.0.att.{gone}"]
    error = refused(to_file(tensors, tmp_path / "x.pth"))
    assert error.what == f"GPT-2 as the book has it, but without trf_blocks.0.att.{gone}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in plain(small()).items()}
    tensors["h.0.mlp.c_proj.weight"][3, 5] = value
    path = to_file(tensors, tmp_path / "x.pth")
    assert "tensor h.0.mlp.c_proj.weight is not finite" in refused(path).what
    assert refused(path, None).code == 3


@pytest.mark.parametrize(
    "sizes",
    [{"wte.weight": (N_VOCAB, 0)}, {"wpe.weight": (0, 16)}, {"wpe.weight": (8, 17)}, {"wte.weight": (0, 16)}],
    ids=str,
)
def test_embeddings_without_rows_or_columns_are_refused(tmp_path, sizes):
    tensors = plain(small()) | {name: torch.ones(size) for name, size in sizes.items()}
    del tensors["lm_head.weight"]
    refused(to_file(tensors, tmp_path / "x.pth"), None)


@pytest.mark.parametrize("n_head", [3, 17, 10**30, 0, -1, 1.0, "2", None, True, torch.ones(2)], ids=repr)
def test_a_number_of_heads_that_cannot_be_is_refused_or_left_out_of_account(tmp_path, n_head):
    content = as_nanogpt(small())
    content["model_args"]["n_head"] = n_head
    path = to_file(content, tmp_path / "ckpt.pt")
    if type(n_head) is int and n_head in (3, 17):
        assert f"n_embd 16 is not divisible by n_head {n_head}" in refused(path, None).what
    else:
        assert load(path).config.n_head == 1


def test_no_bit_of_the_header_of_safetensors_flips_to_other_weights(tmp_path, record_property):
    path = saved(small(), tmp_path / "hf") / "model.safetensors"
    content, expected = path.read_bytes(), load(path.parent).state_dict()
    end, refusals, harmless = 8 * (8 + int.from_bytes(content[:8], "little")), 0, 0
    bits = [*range(64), *random.Random(0).sample(range(64, end), 100)]
    for bit in bits:
        path.write_bytes(flipped(content, bit))
        try:
            found = load(path.parent).state_dict()
        except UserError as error:
            assert error.code == 3 and "\n" not in str(error), f"bit {bit}: {error}"
            refusals += 1
        else:
            assert all(torch.equal(found[name], expected[name]) for name in expected), f"bit {bit} flipped unnoticed"
            harmless += 1  # in the words of the header that say nothing about tensors
    text = f"{refusals} refused, {harmless} in words that are not about tensors"
    record_property("count", f"{len(bits)} bits flipped in the header of model.safetensors: {text}, 0 loaded wrongly")
    assert refusals > 150


# Our own files, made by somebody who means harm


def content_of(mine: GPT, cfg: LoRAConfig | None = None, **changes: Tensor | None) -> dict[str, Any]:
    """What save_model writes, with other tensors; the adapters are not folded in."""
    tensors = {name: tensor.clone() for name, tensor in mine.state_dict().items()} | changes
    identity = Identity(mine.config, N_VOCAB, "bytes", None, cfg)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {"format": checkpoint.FORMAT, "step": 1, **identity.as_dict(), "weights": kept}


@pytest.mark.filterwarnings("ignore")  # about sparse tensors
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "changes",
    [
        {"wte.weight": None},
        {"wte.weight": torch.tensor(1.0), "lm_head.weight": torch.tensor(1.0)},
        {"wpe.weight": torch.tensor(1.0)},
        {"wpe.weight": torch.ones(8, 16, dtype=torch.int64)},
        {"wpe.weight": torch.ones(8, 16).to_sparse()},
        {"wpe.weight": torch.ones(8, 16, device="meta")},
        {"wpe.weight": torch.ones(8, 16, dtype=torch.complex64)},
        {"ln_f.weight": torch.full((16,), torch.nan)},
        {"h.0.attn.c_attn.weight": torch.ones(48, 17)},
        {"h.0.attn.c_attn.lora_a": torch.ones(2, 16)},
    ],
    ids=lambda changes: " ".join(f"{k} {'gone' if v is None else describe(v)}" for k, v in changes.items()),
)
def test_tensors_in_our_own_files_that_are_not_ours_are_refused(tmp_path, changes, tied):
    mine = GPT(dataclasses.replace(TINY, tie_weights=tied), N_VOCAB)
    if not tied and changes == {"wte.weight": None}:
        changes = changes | {"lm_head.weight": None}
    refused(to_file(content_of(mine, **changes), tmp_path / "last_model.pt"), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"h.0.attn.c_attn.lora_a": None},
        {"h.0.attn.c_attn.lora_b": None},
        {"h.0.attn.c_attn.weight": None},
        {"h.0.attn.c_attn.lora_a": torch.ones(3, 16)},
        {"h.0.attn.c_attn.lora_b": torch.ones(48, 3)},
        {"h.0.attn.c_attn.lora_b": torch.tensor(1.0)},
        {"h.0.attn.c_attn.lora_a": torch.ones(1, 10**5), "h.0.attn.c_attn.lora_b": torch.ones(10**5, 1)},
    ],
    ids=lambda changes: " ".join(f"{name} {None if t is None else list(t.shape)}" for name, t in changes.items()),
)
def test_adapters_that_do_not_fit_beside_their_weights_are_refused_before_they_are_multiplied(tmp_path, changes):
    cfg = LoRAConfig(2, 4, ["attn.c_attn"])
    mine = GPT(TINY, N_VOCAB)
    lora.add(mine, cfg)
    assert (
        load(to_file(content_of(mine, cfg), tmp_path / "whole.pt")).n_parameters() == GPT(TINY, N_VOCAB).n_parameters()
    )
    error = refused(to_file(content_of(mine, cfg, **changes), tmp_path / "last_model.pt"), None)
    assert "adapter" in error.what


# Directories


def test_another_family_of_models_is_named(tmp_path):
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 64,
        "vocab_size": N_VOCAB,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"never looked at")
    for error in (refused(tmp_path), refused(tmp_path, None)):
        assert error.what == "a mistral model (MistralForCausalLM), not GPT-2, Llama or Qwen3"


VARIANTS = {
    "n_inner": 100, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False,
    "layer_norm_epsilon": 1e-6, "add_cross_attention": True,
}  # fmt: skip


@pytest.mark.parametrize("key", VARIANTS)
def test_another_kind_of_gpt2_is_refused_with_what_is_different(tmp_path, key):
    folder = saved(small(), tmp_path / "hf")
    content = json.loads((folder / "config.json").read_text()) | {key: VARIANTS[key]}
    (folder / "config.json").write_text(json.dumps(content))
    for error in (refused(folder), refused(folder, None)):
        assert f"another kind of GPT-2: {key} {VARIANTS[key]}, not " in error.what


@pytest.mark.parametrize("n_head", ["2", 0, 3, None, 2.0, True, 10**30])
def test_a_configuration_with_an_impossible_number_is_refused(tmp_path, n_head):
    folder = saved(small(), tmp_path / "hf")
    content = json.loads((folder / "config.json").read_text()) | {"n_head": n_head}
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, None)


# Memory


PROGRAM = """
import sys
from pathlib import Path
import torch
from gpt import tokenizer
from gpt.machine import free_memory
from gpt.weights import loading
torch.set_num_threads(1)
tokenizer.load("gpt2")  # which takes as much for the smallest model
before = free_memory.peak()
model = loading.load(sys.argv[1], Path("."), torch.device("cpu")).model
print(free_memory.peak() - before, sum(p.nbytes for p in model.parameters()))
"""


def large(tied: bool = True) -> GPT2LMHeadModel:
    """77 MB, or 211 MB with a head of its own."""
    sizes = {"n_embd": 256, "n_head": 4} if tied else {"n_embd": 384, "n_head": 6}
    return theirs(vocab_size=50257, n_layer=8, n_positions=64, tie_word_embeddings=tied, **sizes)


def checkpoint_of(reference: GPT2LMHeadModel, folder: Path, cfg: LoRAConfig | None = None) -> Path:
    c = reference.config
    shape = model_config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, context_length=c.n_positions)
    mine = GPT(shape, c.vocab_size)
    if cfg:
        lora.add(mine, cfg)
    identity = Identity(shape, c.vocab_size, "gpt2", None, cfg)
    progress = Progress(step=1, tokens=1, best=9.0, best_step=0)
    return checkpoint.publish(folder, mine, optim.build(mine, adamw_config()), progress, identity, {}, keep=1)


LARGE = {
    "transformers": lambda f: saved(large(), f / "hf"),
    "transformers, float16": lambda f: saved(large().half(), f / "hf"),
    "transformers, in shards": lambda f: saved(large(), f / "hf", max_shard_size="20MB"),
    "transformers, untied": lambda f: saved(large(tied=False), f / "hf"),
    "pytorch_model.bin": lambda f: FORMATS["pytorch_model.bin"](large(), f),
    "book": lambda f: to_file(as_book(large()), f / "model.pth"),
    "book, untied": lambda f: to_file(as_book(large(tied=False)), f / "model.pth"),
    "nanoGPT": lambda f: to_file(as_nanogpt(large()), f / "ckpt.pt"),
    "our checkpoint": lambda f: checkpoint_of(large(), f / "run"),
    "our checkpoint, with adapters": lambda f: checkpoint_of(large(), f / "run", LoRAConfig(4, 8, ["attn.c_attn"])),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process apart from its parent's")
@pytest.mark.parametrize(
    "name", [n if n == "book" else pytest.param(n, marks=pytest.mark.exhaustive) for n in LARGE]
)  # the book's file has the embedding twice, matrices the other way round, and one layer in three
def test_loading_takes_hardly_more_memory_than_the_weights(tmp_path, name, record_property):
    path = LARGE[name](tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr
    more, size = map(int, result.stdout.split())
    record_property("count", f"memory of loading {name}: {more / size:.3f} x the {size / 1e6:.0f} MB of the weights")
    pages = 16e6  # of files that are mapped: Linux 6.18 maps larger pieces than older kernels around each that is read
    assert size > 70e6 and 0.9 * size < more < 1.1 * size + pages


def test_adapters_that_are_not_merged_are_refused_with_what_to_do_in_peft(tmp_path):
    tensors = {f"base_model.model.transformer.{name}": tensor for name, tensor in plain(small()).items()}
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    tensors[f"{layer}.base_layer.weight"] = tensors.pop(f"{layer}.weight")
    tensors |= {
        f"{layer}.lora_A.default.weight": torch.ones(2, 16),
        f"{layer}.lora_B.default.weight": torch.ones(48, 2),
    }
    error = refused(to_file(tensors, tmp_path / "x.pth"))
    assert error.what.startswith("2 tensors that the model has no place for") and "merge_and_unload" in error.remedy
