"""Shards a model over ranks with torch's FSDP2: each keeps some rows of every weight, gradient and optimizer state.

The weights of a block are whole only while it computes. Those outside of the blocks are whole from the first of them
that is needed to the end of backward; a tied head is the embedding, so both are in this one group.
"""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from gpt.model import LanguageModel


def shard(model: LanguageModel, device: torch.device, dtype: torch.dtype) -> None:
    """Shards the weights of a model on the CPU, and moves what this rank keeps of them to its device.

    Matrix products are in `dtype`, as under autocast, which stays on: the linear layers of a block are sent around in
    it, which is half of the bytes, and their gradients are summed in float32. All else (norms, embeddings, the stream
    between the blocks) is in float32, as autocast has it; that is why a block's linear layers are the group, and not
    the block. Gradients are sums over ranks, not means.
    """
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # A linear layer returns a view of its product. torch warns that it must not be written to, which nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    for block in model.blocks:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        fully_shard(layers, mesh=mesh, mp_policy=exact if dtype == torch.float32 else low)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for group in groups(model):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo knows no product before a sum


def groups(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
