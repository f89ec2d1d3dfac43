"""Adds low-rank adapters to a model and merges them: Hu et al., "LoRA: Low-Rank Adaptation" (2021).

Fine-tuning changes each weight W by a matrix of W's shape. Here that matrix is a product of two thin ones, B A, and
only these are trained. B starts at 0, so training starts from exactly the model that was loaded; at the end B A is
added to W, and the model has no adapters any more.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config.schema import LoRAConfig
from gpt.model import LanguageModel

SUFFIXES = (".lora_a", ".lora_b")  # of the names of A and B, after that of their layer


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank * B A x, where W is (out, in), A (rank, in) and B (out, rank).

    It replaces a linear layer, shares its weight and bias, and keeps their names.
    """

    def __init__(self, linear: nn.Linear, cfg: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")  # no memory for a second W and b
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = cfg.alpha / cfg.rank
        self.lora_a = nn.Parameter(self.weight.new_empty(cfg.rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, cfg.rank))
        if not self.weight.is_meta:  # on the meta device A is loaded later
            on_cpu = torch.empty_like(self.lora_a, device="cpu")  # as the generator is: one A for all devices
            nn.init.kaiming_uniform_(on_cpu, a=math.sqrt(5), generator=generator)  # peft's: up to 1 / sqrt(in)
            self.lora_a.data.copy_(on_cpu)

    def forward(self, x: Tensor) -> Tensor:
        low = self.scale * F.linear(x, self.lora_a)  # (..., rank), scaled where it is smallest
        return super().forward(x) + F.linear(low, self.lora_b)  # (..., out)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One matrix for both, W + alpha / rank * B A, in float32 on the CPU: a GPU's product may round to TF32."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        weight = merged_weight(self.weight.cpu(), self.lora_a.cpu(), self.lora_b.cpu(), self.scale)
        linear.weight, linear.bias = nn.Parameter(weight.to(self.weight)), self.bias
        return linear


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + alpha / rank * B A, (out, in), in float32."""
    return weight.float() + scale * (b.float() @ a.float())


def add(model: LanguageModel, cfg: LoRAConfig, seed: int = 0) -> None:
    """Adds adapters, drawn with a generator of their own, to the chosen layers of every block and freezes the rest.

    Raises ValueError for a model that has some already.
    """
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for target in cfg.targets:
            block.set_submodule(target, LoRALinear(block.get_submodule(target), cfg, generator))


def merge(model: LanguageModel) -> None:
    """Replaces each layer that has an adapter by an nn.Linear of the merged weight, and makes everything trainable."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    model.requires_grad_(True)


def adapters(model: LanguageModel) -> dict[str, Tensor]:
    """A and B of all layers that have them, by names such as h.0.attn.c_attn.lora_a; the tensors are not copied."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(SUFFIXES)}


def merged_weights(weights: dict[str, Tensor], cfg: LoRAConfig) -> dict[str, Tensor]:
    """The weights, on the CPU, of a model with adapters -> those of the equal model without."""
    merged = {name: tensor for name, tensor in weights.items() if not name.endswith(SUFFIXES)}
    for name in weights:
        layer = name.removesuffix(".lora_a")
        if layer != name and f"{layer}.weight" in merged and f"{layer}.lora_b" in weights:
            a, b = weights[name], weights[f"{layer}.lora_b"]
            merged[f"{layer}.weight"] = merged_weight(merged[f"{layer}.weight"], a, b, cfg.alpha / cfg.rank)
    return merged
