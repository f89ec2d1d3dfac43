"""Describes weights before they are read: where they are, and of which architecture. No torch."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gpt.config.families import ModelConfig
from gpt.errors import CHECKPOINT, UserError, unusable
from gpt.files.json_file import read_object
from gpt.weights import llama_config


@dataclass(frozen=True)
class Source:
    """Weights that are there, but have not been read. `kind` "file" is one whose content says what it is."""

    name: str  # as it was typed
    path: Path
    kind: Literal["own", "transformers", "tensorflow", "adapter", "file"]
    revision: str | None = None  # of the hub

    def stated(self) -> "Architecture | None":
        """The architecture by the configuration beside the weights; None where there is none."""
        if self.kind == "transformers":
            return of_transformers(self.path / "config.json")
        return of_openai(self.path / "hparams.json") if self.kind == "tensorflow" else None


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, a GPT-2 if `model` is not another. `stated`: what the file says itself; the rest follows
    from shapes, or is what is usual."""

    n_layer: int
    n_head: int
    n_embd: int
    context_length: int
    vocab_size: int
    tie_weights: bool = True
    gelu: Literal["tanh", "exact"] | None = "tanh"  # None: of another family
    stated: tuple[str, ...] = ("n_head",)
    model: ModelConfig | None = None  # all settings, where they are known
    tokenizer: str = "gpt2"  # the name of one that is built in, or the folder with its files

    @property
    def family(self) -> str:
        return self.model.family if self.model else "gpt2"


def of_openai(path: Path) -> Architecture:
    """From OpenAI's hparams.json."""
    n = integers(path, read_json(path), "n_layer", "n_head", "n_embd", "n_ctx", "n_vocab")
    return Architecture(n["n_layer"], n["n_head"], n["n_embd"], n["n_ctx"], n["n_vocab"])


# What transformers' configuration can say that is not in our model; its own values where it does not say anything.
FREE = ("name", "context_length", "dropout", "tie_weights")  # settings that a model may have otherwise than its weights
FIXED = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}  # fmt: skip
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "exact", "gelu_python": "exact"}


def of_transformers(path: Path) -> Architecture:
    """From transformers' config.json. Raises UserError (3) for another family, and for another kind of GPT-2."""
    config = read_json(path)
    family = config.get("model_type")
    if isinstance(family, str) and family in llama_config.CLASSES:
        n = integers(path, config, *llama_config.SHAPE)
        return of_model(llama_config.read(path, config, n), n["vocab_size"])
    if family != "gpt2":
        classes = config.get("architectures")
        named = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
        what = f"a {family} model{named}, not GPT-2, Llama or Qwen3"
        raise UserError(what, str(path), "only these can be read", CHECKPOINT)
    n = integers(path, config, "n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    wanted = FIXED | {"n_inner": 4 * n["n_embd"]}
    values = {key: config.get(key, value) for key, value in wanted.items()}
    values["n_inner"] = values["n_inner"] or wanted["n_inner"]
    others = [f"{key} {values[key]}, not {value}" for key, value in wanted.items() if values[key] != value]
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GELU:
        others.append(f"activation_function {activation}, not gelu_new")
    if others:
        raise UserError("another kind of GPT-2: " + "; ".join(others), str(path), "", CHECKPOINT)
    return Architecture(
        n["n_layer"], n["n_head"], n["n_embd"], n["n_positions"], n["vocab_size"],
        bool(config.get("tie_word_embeddings", True)), GELU[activation], ("n_head", "gelu"),
    )  # fmt: skip


def of_model(model: ModelConfig, vocab_size: int, tokenizer: str = "gpt2") -> Architecture:
    """Of a model whose settings are known."""
    stated = tuple(field.name for field in fields(model) if field.name not in FREE)
    shape = model.n_layer, model.n_head, model.n_embd, model.context_length, vocab_size, model.tie_weights
    return Architecture(*shape, getattr(model, "gelu", None), stated, model, tokenizer)


def integers(path: Path, content: dict[str, Any], *keys: str) -> dict[str, int]:
    """The values of some keys, each a whole number from 1 on. Raises UserError (3)."""
    for key in keys:
        if type(content.get(key)) is not int or not 1 <= content[key] < 2**31:
            raise unusable(path, f"{key} is {content.get(key)!r}, not a whole number from 1 on")
    return {key: content[key] for key in keys}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises UserError (3)."""
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise unusable(path, getattr(error, "strerror", None) or f"not JSON: {error}") from error
