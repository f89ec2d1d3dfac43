"""Keeps a running mean of the weights beside an optimizer, for evaluation (Polyak averaging)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.files.tensor_shards import own_rows


class RunningMean(torch.optim.Optimizer):
    """The exponential mean of weights that other optimizers train, which is stepped after theirs.

    In each step it forgets a part 1 - decay. What was before the first step has no part in it: after t steps step s
    has the weight decay^(t - s) (1 - decay) / (1 - decay^t), as Adam corrects its moments (Kingma and Ba, 2015).
    It is an optimizer so that its state is saved, restored, counted and sharded as theirs is.
    """

    def __init__(self, params: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            decay = group["decay"]
            for weights in group["params"]:
                state = self.state[weights]
                if not state:
                    state.update(step=torch.zeros(()), mean=torch.zeros_like(weights))
                state["step"] += 1
                own_rows(state["mean"]).lerp_(own_rows(weights), (1 - decay) / (1 - decay ** int(state["step"])))


@contextmanager
@torch.no_grad()
def in_place(running_mean: RunningMean) -> Iterator[None]:
    """Within it the model has the mean weights; afterwards its own again, to the last bit, as they are copied."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for weights, state in running_mean.state.items():
            kept.append((own_rows(weights), own_rows(weights).clone()))
            own_rows(weights).copy_(own_rows(state["mean"]))
        yield
    finally:
        for weights, before in kept:
            weights.copy_(before)
