"""Holds what a run computes on: a device, a precision, and the processes that share a step."""

from dataclasses import dataclass, field
from typing import Any

import torch

from gpt.machine.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Machine:
    """A device, the type of its matrix products, and the processes that share a step."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    environment: dict[str, Any] = field(default_factory=dict)  # what results depend on besides the settings
    ranks: Ranks = ALONE

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`; float32 leaves everything as it is."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=low)
