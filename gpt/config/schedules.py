"""Defines the settings of what changes from step to step: the learning rate, and the window of attention."""

from typing import ClassVar, Literal

from gpt.config.fields import Count, Fraction, NonNegative, section, variants


@section
class _Schedule:
    """What every schedule has. Lengths below 1 are fractions of the run, from 1 on steps. See gpt/optim.py."""

    name: str
    warmup: NonNegative
    window_warmup: NonNegative | None
    window_start: Count


@section
class ConstantConfig(_Schedule):
    """Warm-up, then the same learning rate to the end."""

    name: Literal["constant"]

    decay: ClassVar[float] = 0
    final: ClassVar[float] = 1


@section
class DecayConfig(_Schedule):
    """Warm-up, then a curve down to final * optimizer.lr. See gpt/optim.py."""

    name: Literal["cosine", "linear"]
    final: Fraction

    decay: ClassVar[float] = 0


@section
class WSDConfig(_Schedule):
    """Warm-up, a stable part, and a decay to final * optimizer.lr (Hu et al., 2024)."""

    name: Literal["wsd"]
    decay: NonNegative
    final: Fraction


ScheduleConfig = variants(ConstantConfig | DecayConfig | WSDConfig, "name")
