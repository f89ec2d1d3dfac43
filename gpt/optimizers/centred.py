"""Keeps the mean row of a head at zero beside an optimizer."""

import torch
from torch import nn


class Centred(torch.optim.Optimizer):
    """Takes the mean of its rows from a (V, C) matrix that another optimizer has just stepped.

    All logits change by the same number, so no probability does. Where the head is the embedding, the stream does: Adam
    moves the rows of all tokens that it has not seen yet in one direction, away from the mean stream, until they hardly
    differ from each other; what is left without that direction tells them apart.
    It is an optimizer, without a state, so that it is built and stepped as the others are.
    """

    def __init__(self, head: nn.Parameter) -> None:
        super().__init__([head], {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                matrix.sub_(matrix.mean(0))
