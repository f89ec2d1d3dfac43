"""Holds what a run computes on: a device, a precision, and the processes that share a step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Shares a step between processes. There is one so far: it computes all of a step, and its sums are the whole.

    gpt/loop.py asks this object and nothing else, so that more processes are a matter of this class.
    """

    def share(self, batches: list) -> list:
        """The micro-batches of a step that this process computes."""
        return batches

    def total(self, value: float) -> float:
        """The sum over all processes of a number that each has a part of."""
        return value

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes: gradients, and the loss."""


@dataclass(frozen=True)
class Machine:
    """A device, the type of its matrix products, and the processes that share a step."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    environment: dict[str, Any] = field(default_factory=dict)  # what results depend on besides the settings
    ranks: Ranks = field(default_factory=Ranks)

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`; float32 leaves everything as it is."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=low)
