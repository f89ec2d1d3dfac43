"""Writes a model as a Hugging Face directory, which transformers, the hub and llama.cpp's converter read.

Names, shapes and settings are those of GPT2LMHeadModel. llama.cpp asks for some things more: `n_ctx` in config.json,
which transformers 5 no longer writes, one file model*.safetensors, and a tokenizer that cuts texts as GPT-2's does.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gpt import lora, tokenizer
from gpt.errors import ENVIRONMENT, UserError
from gpt.files.atomic import sha256, sync, why_refused
from gpt.files.directory import in_bytes
from gpt.model import GPT, INIT_STD, LAYER_NORM_EPS
from gpt.runs.model_file import Loaded
from gpt.tokenizer import END_OF_TEXT
from gpt.weights import hub_card
from gpt.weights.tensor_names import MATRIX
from gpt.weights.weight_files import SUMS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ACTIVATIONS = {"tanh": "gelu_new", "exact": "gelu"}


def write(loaded: Loaded, directory: Path) -> None:
    """Writes the directory, which appears whole or not at all. In memory the matrices of the blocks are there twice.

    Raises UserError: (2) when something is in the way, or the model has no counterpart, (5) when the disk refuses.
    """
    temporary = directory.parent / f".{directory.name}.new"
    tensors = tensors_of(loaded.model)
    try:
        check(loaded, directory)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in texts_of(loaded).items():
            (temporary / name).write_bytes(content)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(whole, temporary / WEIGHTS, {"format": "pt"})  # transformers 4 wants to know it
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors lets nobody else read
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / SUMS).write_text("".join(sums), newline="\n")  # as `sha256sum -c` reads it
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        with contextlib.suppress(OSError):
            directory.rmdir()  # an empty one, and no other; only Linux and macOS replace it by renaming
        temporary.rename(directory)
        sync(directory.parent)
    except (OSError, SafetensorError) as error:
        needed = in_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        raise UserError(
            f"{directory.name} not written: {why_refused(error)} (needs {needed})",
            str(directory.parent), "make room, or name another directory", ENVIRONMENT,
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check(loaded: Loaded, directory: Path) -> None:
    """Raises UserError (2) with the reason why this model cannot be exported to there."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError("the export would replace what is there", str(directory), "name a directory that is not there")
    model, path = loaded.model, str(loaded.path)
    if model.config.family != "gpt2":
        reason = f"it is of the family {model.config.family}, and only gpt2 has a form that transformers knows"
        raise UserError(f"the model cannot be exported: {reason}", path)
    if loaded.tokenizer_name != "gpt2":
        reason = f"its tokenizer is {loaded.tokenizer_name}, which transformers does not know"
        raise UserError(f"the model cannot be exported: {reason}", path, "train with data.tokenizer=gpt2")
    n_vocab = tokenizer.load("gpt2").n_vocab
    if model.vocab_size != n_vocab:
        reason = f"vocabulary {model.vocab_size}, its tokenizer {loaded.tokenizer_name} has {n_vocab}"
        raise UserError(f"the model cannot be exported: {reason}", path)
    if lora.adapters(model):
        raise UserError("the model cannot be exported: it has weights that GPT-2 has not", path, "merge its adapters")


def tensors_of(model: GPT) -> dict[str, Tensor]:
    """The weights under the names of GPT2LMHeadModel, whose Conv1D has matrices as (in, out). No tensor is copied."""
    return {
        name if name.startswith("lm_head.") else f"transformer.{name}": tensor.T if MATRIX.fullmatch(name) else tensor
        for name, tensor in model.state_dict().items()
    }


def texts_of(loaded: Loaded) -> dict[str, bytes]:
    """The content of all files but the weights and the sums."""
    vocabulary, merges = tokenizer.openai_file(tokenizer.ENCODER), tokenizer.openai_file(tokenizer.MERGES)
    end = {"bos_token_id": tokenizer.load("gpt2").eos, "eos_token_id": tokenizer.load("gpt2").eos}
    return {
        "README.md": hub_card.text(loaded).encode(),
        CONFIG: in_json(config_of(loaded.model) | end),
        "generation_config.json": in_json({**end, "pad_token_id": end["eos_token_id"], "do_sample": False}),
        "vocab.json": vocabulary,
        "merges.txt": merges,
        "tokenizer.json": json.dumps(fast_tokenizer(json.loads(vocabulary), merges.decode())).encode(),
        "tokenizer_config.json": in_json({
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": loaded.model.config.context_length,
            "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,  # "What is Asthma ?" stays what it is
        }),
    }  # fmt: skip


def config_of(model: GPT) -> dict[str, Any]:
    """config.json, without the ids of tokens."""
    c = model.config
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab_size,
        "n_positions": c.context_length, "n_ctx": c.context_length,
        "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": None,
        "activation_function": ACTIVATIONS[c.gelu],
        "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "resid_pdrop": c.dropout,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": INIT_STD,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
        "tie_word_embeddings": c.tie_weights,
        "use_cache": True,
        "dtype": "float32", "torch_dtype": "float32",  # in transformers 5 and 4
    }  # fmt: skip


def fast_tokenizer(vocabulary: dict[str, int], merges: str) -> dict[str, Any]:
    """tokenizer.json: the same two files as the library `tokenizers` and those without Python read them."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": vocabulary[END_OF_TEXT], "content": END_OF_TEXT, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}],
        "normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},  # adds nothing; a token's place has its space in it
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": merges.splitlines()[1:],  # after the line with the version
        },
    }  # fmt: skip


def in_json(content: dict[str, Any]) -> bytes:
    """For people too: one line for each key."""
    return (json.dumps(content, indent=2) + "\n").encode()
