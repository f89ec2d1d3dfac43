"""Registers the optimizers: the settings of each, and what it is built by.

Another one needs a dataclass, which may be added to the union below, and a file in conf/optimizer/.
"""

from typing import ClassVar, Literal

from gpt.config.fields import BelowOne, Count, Flag, NonNegative, Positive, Whole, section, variants


@section
class AdamWConfig:
    """Decoupled weight decay (Loshchilov and Hutter, 2019)."""

    built_by: ClassVar[str] = "gpt.optim:build_adamw"

    name: Literal["adamw"]
    lr: Positive
    weight_decay: NonNegative
    beta1: BelowOne
    beta2: BelowOne
    eps: Positive
    embedding_lr: Positive | None
    head_lr: Positive | None
    scalar_lr: Positive | None


@section
class MuonConfig:
    """Muon for the matrices inside the blocks, AdamW (lr, betas, eps) for embeddings, head, norms and biases."""

    built_by: ClassVar[str] = "gpt.optim:build_muon"

    name: Literal["muon"]
    lr: Positive
    weight_decay: NonNegative
    momentum: BelowOne
    nesterov: Flag
    scale: Literal["original", "match_rms_adamw"]
    orthogonalization: Literal["newton_schulz", "polar_express"]
    cautious_decay: Flag
    momentum_warmup: Whole
    second_moment: BelowOne | None
    centred_head: Flag
    adamw_lr: Positive
    beta1: BelowOne
    beta2: BelowOne
    eps: Positive
    embedding_lr: Positive | None
    head_lr: Positive | None
    scalar_lr: Positive | None


@section
class SOAPConfig:
    """SOAP for the matrices inside the blocks, AdamW with the same betas and eps for everything else."""

    built_by: ClassVar[str] = "gpt.optim:build_soap"

    name: Literal["soap"]
    lr: Positive
    weight_decay: NonNegative
    beta1: BelowOne
    beta2: BelowOne
    eps: Positive
    precondition_every: Count
    adamw_lr: Positive
    embedding_lr: Positive | None
    head_lr: Positive | None
    scalar_lr: Positive | None


@section
class SGDConfig:
    """Stochastic gradient descent with momentum."""

    built_by: ClassVar[str] = "torch.optim:SGD"

    name: Literal["sgd"]
    lr: Positive
    weight_decay: NonNegative
    momentum: BelowOne


# The only list of optimizers. `built_by` is module:attribute, as torch is not imported here: a class of torch.optim's
# kind, whose arguments are the other settings; or a function of the model, the settings, and `Scale` of gpt/optim.py.
OPTIMIZERS = AdamWConfig | MuonConfig | SOAPConfig | SGDConfig
OptimizerConfig = variants(OPTIMIZERS, "name")
