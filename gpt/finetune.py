"""Decides which weights are trained, and how fast each of them."""

from torch import nn

from gpt import lora
from gpt.config.schema import FinetuneConfig
from gpt.model import LanguageModel


def prepare(model: LanguageModel, cfg: FinetuneConfig | None, seed: int) -> None:
    """Freezes what is not trained, and adds adapters, in a loaded model, before its optimizer is built.

    Trained are, with None and full, everything; with lora, the adapters, which are drawn with a generator of their own;
    with last_blocks, these, the final norm, and the head if it is a matrix of its own (a tied one is the embedding).
    """
    if cfg is None or cfg.name == "full":
        return
    if cfg.name == "lora":
        lora.add(model, cfg.lora, seed)
        return
    for name, depth in depths(model).items():
        model.get_parameter(name).requires_grad_(depth <= cfg.n_blocks)


def depths(model: LanguageModel) -> dict[str, int]:
    """The number of blocks from each parameter to the loss, its own block included: 0 for the final norm and an untied
    head, n_layer + 1 for the embeddings and thus a tied head."""
    below = embeddings(model)
    depth = {p: len(model.blocks) - i for i, block in enumerate(model.blocks) for p in block.parameters()}
    return {name: len(model.blocks) + 1 if p in below else depth.get(p, 0) for name, p in model.named_parameters()}


def embeddings(model: LanguageModel) -> set[nn.Parameter]:
    """The weights below the blocks; a tied head is among them."""
    return {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}


def kinds(model: LanguageModel) -> dict[str, str]:
    """What learning rates are told apart by, for each parameter: "embedding", also for a tied head, "head", "scalar"
    for those of less than two dimensions, such as biases and norms, else "matrix"."""
    below = embeddings(model)
    return {
        name: "embedding" if p in below else "head" if p is model.head else "scalar" if p.dim() < 2 else "matrix"
        for name, p in model.named_parameters()
    }


def lr_scales(model: LanguageModel, decay: float) -> dict[str, float]:
    """The factor of each parameter's learning rate: `decay` for each of its `depths`.

    Lower layers hold more general features and need less change (Howard and Ruder, 2018; Clark et al., 2020).
    """
    return {name: decay**depth for name, depth in depths(model).items()}


def n_plain(model: LanguageModel) -> int:
    """The number of parameters, adapters not counted."""
    return model.n_parameters() - sum(tensor.numel() for tensor in lora.adapters(model).values())


def n_trained(model: LanguageModel) -> int:
    """The number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe(model: LanguageModel, cfg: FinetuneConfig | None) -> str:
    """The numbers of parameters, adapters not counted, and of trained ones, as a run prints them."""
    total = f"{n_plain(model):,} parameters"
    return total if cfg is None else f"{total}, {n_trained(model):,} trained (finetune={cfg.name})"
