"""Writes a model as a Hugging Face directory, which transformers, the hub and llama.cpp's converter read.

Names, shapes and settings are those of GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM. Of GPT-2, llama.cpp asks
for some things more: `n_ctx` in config.json, which transformers 5 no longer writes, one file model*.safetensors, and a
tokenizer that cuts texts as GPT-2's does.
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
from gpt.config.families import ModernConfig
from gpt.errors import ENVIRONMENT, UserError
from gpt.files.atomic import sha256, sync, why_refused
from gpt.files.directory import in_bytes
from gpt.model import GPT, INIT_STD, LAYER_NORM_EPS, LanguageModel
from gpt.runs.model_file import Loaded
from gpt.runs.peft_adapter import PREFIXES
from gpt.tokenizer import END_OF_TEXT, Tokenizer
from gpt.weights import hub_card, llama_config
from gpt.weights.tensor_names import MATRIX
from gpt.weights.weight_files import SUMS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ACTIVATIONS = {"tanh": "gelu_new", "exact": "gelu"}


def write(loaded: Loaded, directory: Path) -> None:
    """Writes the directory, which appears whole or not at all. In memory the matrices of the blocks are there twice.

    Raises UserError: (2) when something is in the way, or the model has no counterpart, (5) when the disk refuses.
    """
    check(loaded, directory)
    whole = {name: tensor.contiguous() for name, tensor in tensors_of(loaded.model).items()}
    publish(directory, texts_of(loaded), WEIGHTS, whole, {"format": "pt"})  # transformers 4 wants to know it


def publish(
    directory: Path, texts: dict[str, bytes], name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:  # fmt: skip
    """Writes a directory of texts, of tensors in a file of safetensors and of their sums, whole or not at all. Raises
    UserError: (2) when something is in the way, (5) when the disk refuses."""
    temporary = directory.parent / f".{directory.name}.new"
    try:
        check_place(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file, content in texts.items():
            (temporary / file).write_bytes(content)
        safetensors.torch.save_file(tensors, temporary / name, metadata)
        shutil.copymode(temporary / CONFIG, temporary / name)  # safetensors lets nobody else read
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


def check_place(directory: Path) -> None:
    """Raises UserError (2) where something is in the way."""
    in_the_way = False
    with contextlib.suppress(OSError):  # what the disk refuses it says again when it is written to
        in_the_way = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if in_the_way:
        raise UserError("the export would replace what is there", str(directory), "name a directory that is not there")


def check_bits(loaded: Loaded) -> None:
    """Raises UserError (2) for a model whose weights have lost bits already."""
    if loaded.model.packed_head is not None:
        what, remedy = "its weights have fewer bits already", "export the checkpoint that it was made of"
        raise UserError(f"the model cannot be exported: {what}", str(loaded.path), remedy)


def check(loaded: Loaded, directory: Path) -> None:
    """Raises UserError (2) with the reason why this model cannot be exported to there."""
    check_place(directory)
    model, path, remedy = loaded.model, str(loaded.path), ""
    others = model.config.unpublished()
    n_vocab = tokenizer.load(loaded.tokenizer_name).n_vocab
    check_bits(loaded)
    if model.config.family not in PREFIXES:
        reason = f"it is of the family {model.config.family}, and only {' and '.join(PREFIXES)} have a form that "
        reason += "transformers knows"
    elif others:
        reason = f"neither {' nor '.join(llama_config.CLASSES.values())} has {', '.join(others)}"
    elif loaded.tokenizer_name == "bytes":
        reason, remedy = "its tokenizer is bytes, which transformers does not know", "train with data.tokenizer=gpt2"
    elif model.vocab_size != n_vocab:
        reason = f"vocabulary {model.vocab_size}, its tokenizer {loaded.tokenizer_name} has {n_vocab}"
    elif lora.adapters(model):
        reason, remedy = "it has weights that its class has not", "merge its adapters"
    else:
        return
    raise UserError(f"the model cannot be exported: {reason}", path, remedy)


def tensors_of(model: LanguageModel) -> dict[str, Tensor]:
    """The weights under the names of transformers; GPT2LMHeadModel's Conv1D has matrices as (in, out). No tensor is
    copied."""
    prefix = PREFIXES[model.config.family]
    return {
        name if name.startswith("lm_head.") else f"{prefix}.{name}": tensor.T if MATRIX.fullmatch(name) else tensor
        for name, tensor in model.state_dict().items()
    }


def texts_of(loaded: Loaded) -> dict[str, bytes]:
    """The content of all files but the weights and the sums."""
    tokens, config = tokenizer.load(loaded.tokenizer_name), loaded.model.config
    end = {"bos_token_id": tokens.eos, "eos_token_id": tokens.eos}
    if isinstance(config, ModernConfig):
        model = llama_config.written(config, loaded.model.vocab_size, INIT_STD)
    else:
        model = config_of(loaded.model)
    return {
        "README.md": hub_card.text(loaded).encode(),
        CONFIG: in_json(model | end),
        "generation_config.json": in_json({**end, "pad_token_id": end["eos_token_id"], "do_sample": False}),
        **(files_of_its_own(tokens) if tokens.files else files_of_gpt2(config.context_length)),
    }


def files_of_its_own(tokens: Tokenizer) -> dict[str, bytes]:
    """A tokenizer as it was found, with the class that adds nothing to what tokenizer.json says."""
    settings = json.loads(tokens.files[tokenizer.SETTINGS]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return dict(tokens.files) | {tokenizer.SETTINGS: in_json(settings)}


def files_of_gpt2(context_length: int) -> dict[str, bytes]:
    """GPT-2's tokenizer."""
    vocabulary, merges = tokenizer.openai_file(tokenizer.ENCODER), tokenizer.openai_file(tokenizer.MERGES)
    return {
        "vocab.json": vocabulary,
        "merges.txt": merges,
        "tokenizer.json": json.dumps(fast_tokenizer(json.loads(vocabulary), merges.decode())).encode(),
        "tokenizer_config.json": in_json({
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": context_length,
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
