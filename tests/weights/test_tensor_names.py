"""Other projects' names of tensors: which layout some have, and what they are called here."""

import pytest
import torch
from conftest import model_config

from gpt.files.tensor_shards import shape_of
from gpt.model import GPT
from gpt.weights import tensor_names

D, V, T = 4, 7, 3


def ours() -> dict[str, torch.Tensor]:
    model = GPT(model_config(n_embd=D, context_length=T, n_head=1), V)
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def is_matrix(name: str) -> bool:
    return name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name


def transformers(tensors):
    return {name: tensor.T if is_matrix(name) else tensor for name, tensor in tensors.items()}


def openai(tensors):
    found = {}
    for name, tensor in tensors.items():
        words = name.replace("h.", "h", 1).split(".") if name.startswith("h.") else name.split(".")
        leaf = {"bias": ["b"], "weight": ["g"] if "ln_" in name else ["w"] if is_matrix(name) else []}[words[-1]]
        found["/".join(["model", *words[:-1], *leaf])] = tensor.T[None] if is_matrix(name) else tensor
    return found


def book(tensors):
    words = {
        "wte.": "tok_emb.", "wpe.": "pos_emb.", "ln_f.": "final_norm.", "attn.c_proj.": "att.out_proj.",
        "mlp.c_fc.": "ff.layers.0.", "mlp.c_proj.": "ff.layers.2.", "ln_1.": "norm1.", "ln_2.": "norm2.",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        new = name.replace("h.", "trf_blocks.", 1) if name.startswith("h.") else name
        for mine, theirs in words.items():
            new = new.replace(mine, theirs)
        if "norm" in new:
            new = new.replace(".weight", ".scale").replace(".bias", ".shift")
        if "c_attn" in new:
            for word, part in zip(["W_query", "W_key", "W_value"], tensor.chunk(3), strict=True):
                found[new.replace("attn.c_attn", f"att.{word}")] = part
        else:
            found[new] = tensor
    return found


WRITERS = {
    "GPT-2 as transformers has it": transformers,
    "GPT-2 as nanoGPT has it": lambda tensors: {
        name if name.startswith("lm_head") else f"transformer.{name}": tensor for name, tensor in tensors.items()
    },
    "GPT-2 as this project has it": lambda tensors: tensors,
    "GPT-2 as OpenAI released it": openai,
    "GPT-2 as the book has it": book,
}
PREFIXES = [
    "", "transformer.", "_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.transformer.",
    "base_model.model.transformer.", "_fsdp_wrapped_module._flat.", "_module.", "net.gpt.", "my_lm.inner.transformer.",
]  # fmt: skip


def joined(parts):
    return {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in parts.items()}


@pytest.mark.parametrize("about", WRITERS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_layout_is_recognised_with_every_wrapping_and_becomes_ours(about, prefix):
    expected = ours()
    tensors = WRITERS[about](expected)
    if "OpenAI" in about:  # the variables of TensorFlow are in no module
        prefix = ""
    if "project" in about or "nanoGPT" in about:  # the word is what tells them apart
        prefix = prefix.removesuffix("transformer.")
    found = tensor_names.recognise({prefix + name: tensor for name, tensor in tensors.items()})
    parts = found.parts
    assert found.layout == about and joined(parts).keys() == expected.keys() and not found.missing
    assert found.prefix == prefix.removesuffix("transformer.")
    for name, tensor in joined(parts).items():
        assert torch.equal(tensor, expected[name]), name
        assert shape_of(parts[name]) == list(expected[name].shape)


@pytest.mark.parametrize("about", WRITERS)
def test_nothing_is_copied(about):
    tensors = WRITERS[about](ours())
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    parts = tensor_names.recognise(tensors).parts
    assert {part.untyped_storage().data_ptr() for each in parts.values() for part in each} == places


@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.transformer.", "h.0.attn._orig_mod."])
def test_the_masks_of_attention_are_no_weights(prefix):
    tensors = transformers(ours())
    name = "h.0.attn." if prefix.startswith("h.") else f"{prefix}h.1.attn."
    masks = {f"{name}bias": torch.ones(1, 1, T, T, dtype=torch.bool), f"{name}masked_bias": torch.tensor(-1e4)}
    parts = tensor_names.recognise(tensors | masks).parts
    assert parts.keys() == ours().keys()
    parts = tensor_names.recognise(book(ours()) | {"trf_blocks.1.att.mask": torch.ones(T, T)}).parts
    assert parts.keys() == ours().keys()


def test_a_layer_compiled_on_its_own_keeps_its_name():
    tensors = {name.replace("h.0.", "h.0._orig_mod."): tensor for name, tensor in ours().items()}
    assert tensor_names.recognise(tensors).parts.keys() == ours().keys()


def test_what_no_layout_has_keeps_its_name_to_be_named_as_a_stranger():
    for write in WRITERS.values():
        strangers = {"score.weight": torch.ones(2, D), "trf_blocks.0.x.y": torch.ones(1)}
        parts = tensor_names.recognise(write(ours()) | strangers).parts
        assert {"score.weight", "trf_blocks.0.x.y"} == parts.keys() - ours().keys()


def test_a_second_tensor_of_the_same_name_is_a_stranger():
    tensors = ours()
    parts = tensor_names.recognise(tensors | {"transformer.wte.weight": tensors["wte.weight"] + 1}).parts
    assert parts.keys() - tensors.keys() == {"transformer.wte.weight"}
    assert torch.equal(parts["wte.weight"][0], tensors["wte.weight"])


@pytest.mark.parametrize("names", [[], ["weight"], ["model.embed_tokens.weight", "lm_head.weight"], ["wte"]])
def test_an_unknown_layout_is_none(names):
    assert tensor_names.recognise({name: torch.ones(2) for name in names}) is None


@pytest.mark.parametrize("about", WRITERS)
def test_a_layout_is_recognised_by_all_of_its_names_and_what_is_missing_is_named_as_the_file_would(about):
    tensors = WRITERS[about](ours())
    for name in tensors:
        found = tensor_names.recognise({n: tensor for n, tensor in tensors.items() if n != name})
        is_optional = (name.endswith(("bias", "/b", "shift")) and "W_" not in name) or "head" in name
        has_no_head = "OpenAI" in about or not any("head" in n for n in tensors)
        short = name.removeprefix("transformer.")
        is_tied = short in ("wte.weight", "tok_emb.weight") and not has_no_head
        assert found.layout == about and found.missing == ([] if is_optional or is_tied else [short])


@pytest.mark.parametrize("about", [about for about in WRITERS if "OpenAI" not in about])
def test_a_tied_pair_of_which_only_the_head_is_there_is_the_embedding(about):
    tensors = WRITERS[about](ours())
    embedding = next(name for name in tensors if name.endswith(("wte.weight", "tok_emb.weight")))
    tensors["out_head.weight" if "book" in about else "lm_head.weight"] = tensors.pop(embedding)
    found = tensor_names.recognise({f"model.{name}": tensor for name, tensor in tensors.items()})
    assert found.parts.keys() == ours().keys() and found.missing == []


def test_biases_count_as_left_out_only_where_a_model_is_made_without_them():
    names = list(ours())
    biases = [name for name in names if name.endswith(".bias")]
    of_qkv = [name for name in biases if "c_attn" in name]

    def missing(gone):
        return tensor_names.missing_biases({name: () for name in names if name not in gone}, names)

    assert missing([]) == []
    assert missing(biases) == biases and missing(of_qkv) == of_qkv
    assert missing(of_qkv[:1]) == [] and missing(biases[:5]) == []
    assert missing([name for name in biases if name not in of_qkv]) == []
