"""Fine-tuning: which weights are trained, and how fast each of them. Needs no torch until there is a model."""

from typing import TYPE_CHECKING

from gpt.config.families import ModelConfig
from gpt.config.schema import FinetuneConfig
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.model import GPT

# (in, out) of the linear layers of a block, as multiples of n_embd.
LINEAR = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}


def check(model: ModelConfig, cfg: FinetuneConfig | None) -> None:
    """Raises UserError (2) for more blocks than there are, and for adapters with more weights than the smallest layer
    that they can stand beside."""
    if cfg is not None and cfg.name == "last_blocks" and cfg.n_blocks > model.n_layer:
        raise UserError(f"finetune.n_blocks {cfg.n_blocks} is more than the {model.n_layer} blocks of the model")
    if cfg is not None and cfg.name == "lora" and cfg.rank > model.n_embd:
        raise UserError(f"finetune.rank {cfg.rank} is more than the width of the model, n_embd {model.n_embd}")


def prepare(model: "GPT", cfg: FinetuneConfig | None, seed: int) -> None:
    """Freezes what is not trained and adds what is: for the model as it was loaded, before it gets an optimizer.

    None and full: everything. lora: adapters, drawn from a generator of their own. last_blocks: these, the final norm
    and the head if it is a matrix of its own; a tied one is the embedding, and stays. Raises as `check`.
    """
    if cfg is None or cfg.name == "full":
        return
    check(model.config, cfg)
    if cfg.lora:
        from gpt import lora

        lora.add(model, cfg.lora, seed)
        return
    model.requires_grad_(False)
    for module in (*model.h[-cfg.n_blocks :], model.ln_f, model.lm_head):
        if module is not None:
            module.requires_grad_(True)


def describe(model: "GPT", cfg: FinetuneConfig | None) -> str:
    """How many parameters there are, adapters not counted, and how many numbers are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = f"{model.config.n_parameters(model.vocab_size):,} parameters"
    return total if cfg is None else f"{total}, {trained:,} trained (finetune={cfg.name})"


def lr_scale(name: str, n_layer: int, decay: float) -> float:
    """What the learning rate of the weight `name` is multiplied with: `decay` for each layer between it and the loss.

    Head and final norm 1, block i decay^(n_layer - i), embeddings decay^(n_layer + 1); a tied head is an embedding.
    Lower layers hold what is more general, and need less change (Howard and Ruder, 2018; Clark et al., 2020).
    """
    if name.startswith("h."):
        return decay ** (n_layer - int(name.split(".")[1]))
    return decay ** (n_layer + 1) if name.startswith(("wte.", "wpe.")) else 1.0


def n_trainable(model: ModelConfig, cfg: FinetuneConfig | None, vocab_size: int) -> int:
    """How many numbers are trained, by arithmetic alone (d n_embd, V vocabulary).

    lora: rank (in + out) for each layer that has an adapter. last_blocks: 12 d^2 + 13 d for each, 2 d for the final
    norm, V d for an untied head.
    """
    d = model.n_embd
    if cfg is None or cfg.name == "full":
        return model.n_parameters(vocab_size)
    if cfg.name == "lora":
        return model.n_layer * sum(cfg.rank * d * sum(LINEAR[target]) for target in cfg.targets)
    return cfg.n_blocks * (12 * d * d + 13 * d) + 2 * d + (0 if model.tie_weights else vocab_size * d)
