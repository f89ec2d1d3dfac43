"""SOAP (Vyas et al., 2024) of the package pytorch-optimizer, so that it goes on from a checkpoint to the last bit."""

from typing import Any

import pytorch_optimizer
from torch import Tensor


class SOAP(pytorch_optimizer.SOAP):
    """Its eigenvectors lie in memory as a file restores them: products of others differ in the last bit."""

    def update_pre_conditioner(self, grad: Tensor, state: dict[str, Any], **settings: Any) -> None:
        super().update_pre_conditioner(grad, state, **settings)
        state["Q"] = [vectors.contiguous() for vectors in state["Q"]]
