"""Shards a model over ranks with torch's FSDP2: each keeps some rows of every weight, gradient and optimizer state.

The weights of a block are whole only while it computes. Embeddings are whole during forward, to whose end the head may
be one of them; what little else there is, as long as a micro-batch takes.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from gpt.config.schema import ParallelConfig
from gpt.data.batching import IGNORE, Batch
from gpt.files.tensor_shards import is_sharded, own_rows
from gpt.machine import group_faults
from gpt.machine.machine import Machine
from gpt.machine.process_group import ProcessGroup
from gpt.machine.rank_environment import RankEnvironment
from gpt.machine.ranks import COUNTS, STEP
from gpt.model import LanguageModel

T = TypeVar("T")
# Computed by a rank that has nothing left while others have: a collective waits for all ranks.
NOTHING = Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE), None, None, 0, 0)


class ShardedGroup(ProcessGroup):
    """The ranks that torchrun or SLURM has started together, over which one model is sharded."""

    is_sharded = True

    def __init__(self, place: RankEnvironment, cfg: ParallelConfig, faults: group_faults.Faults) -> None:
        super().__init__(place, cfg, faults)
        # Not the group of everything else, which waits for ever: torch, and not our loop, waits for what is below.
        self._group = dist.new_group(timeout=timedelta(seconds=cfg.step_timeout))
        faults.taken = group_faults.BLOCKED
        self._model: nn.Module | None = None
        self._machine = Machine(torch.device("cpu"))

    def place(self, model: LanguageModel, device: torch.device, dtype: torch.dtype) -> LanguageModel:
        self.spread(model.state_dict().values())
        shard(model, DeviceMesh.from_group(self._group, device.type), dtype)
        self._model, self._machine = model, Machine(device, dtype)
        return model

    def each(self, micro_batches: list[Batch]) -> Iterator[Batch]:
        """Gradients are added up over ranks in the last backward pass only."""
        n = int(max(max(row) for row in self._gather([len(micro_batches)], COUNTS)))
        for number, batch in enumerate(self.even(micro_batches, n)):
            self._model.set_requires_gradient_sync(number == n - 1)
            yield batch

    def even(self, batches: Sequence[Batch], n: int) -> list[Batch]:
        return [*batches, *[NOTHING] * (n - len(batches))]

    def gradients(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The rows of this rank: FSDP has added them up."""
        self._add([loss])
        return [own_rows(parameter.grad) for parameter in parameters if parameter.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        square = super().norm(gradients).square()
        self._add([square])
        return square.sqrt()

    def with_model(self, work: Callable[..., T], model: nn.Module, *arguments: Any) -> T:
        """In the precision of a step, which is the one that the linear layers of a block are sent around in."""
        with self.computing(model), self._machine.autocast():
            return work(model, *arguments[:-1], lambda: self.wish(arguments[-1]))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        super().spread(tensor for tensor in tensors if not is_sharded(tensor))

    @contextlib.contextmanager
    def computing(self, model: nn.Module) -> Iterator[None]:
        """Afterwards each rank has its rows only, also of what a pass without backward has left whole. The limit of
        what torch waits for becomes that of a step."""
        self._group.set_timeout(timedelta(seconds=self._limit(STEP)))
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise  # of this rank alone, as when its memory is full
            with self._exchange():
                raise
        for module in groups(model):
            module.reshard()


def shard(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards the weights of a model on the CPU, and moves what this rank keeps of them to its device.

    Matrix products are in `dtype`, as under autocast, which stays on: the linear layers of a block are sent around in
    it, which is half of the bytes, and their gradients are summed in float32. All else (norms, embeddings, the stream
    between the blocks) is in float32, as autocast has it; that is why a block's linear layers are the group, and not
    the block. Gradients are sums over ranks, not means.
    """
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # A linear layer returns a view of its product. torch warns that it must not be written to, which nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    blocks, embeddings = gathered_together(model)
    for layers in blocks:
        fully_shard(layers, mesh=mesh, mp_policy=exact if dtype == torch.float32 else low)
    fully_shard(embeddings, mesh=mesh, mp_policy=exact, reshard_after_forward=False)  # a tied head comes after forward
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for module in groups(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no product before a sum
    register_fsdp_forward_method(model, "hidden")
    release_embeddings(model, embeddings)


def gathered_together(model: LanguageModel) -> tuple[list[list[nn.Module]], list[nn.Module]]:
    """The linear layers of each block, and the embeddings: whole at the same time."""
    blocks = [[module for module in block.modules() if isinstance(module, nn.Linear)] for block in model.blocks]
    return blocks, [module for module in model.modules() if isinstance(module, nn.Embedding)]


def release_embeddings(model: LanguageModel, embeddings: list[nn.Module]) -> None:
    """Lets go of whole embeddings as soon as backward has come to the stream that the head reads.

    They are the largest group. The head's gradient is known by then, and an embedding's takes no weights: at most two
    of these three are in memory at a time."""
    for module in embeddings:
        module.set_unshard_in_backward(False)
    hidden, pending = model.hidden, set()

    def released(*args: Any, **kwargs: Any) -> Tensor:
        stream = hidden(*args, **kwargs)
        if stream.requires_grad:
            pending.add(number := object())
            stream.register_hook(lambda gradient: arrived(number))
        return stream

    def arrived(number: object) -> None:
        pending.discard(number)
        if not pending:  # of an objective with several passes, all
            for module in embeddings[:1]:  # the first stands for all of the group
                module.reshard()

    model.hidden = released


def groups(model: nn.Module) -> list[Any]:
    """The modules that FSDP knows, the model itself among them."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
