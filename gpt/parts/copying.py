"""Mixes the probabilities of a model with how often each token has followed the last ones before in the same context.

An n-gram model of the context alone, with a share that the stream decides: a cache language model (Kuhn and De Mori,
1990) with the gate of a pointer-generator (See et al., 2017). A small model learns late that names come again; counts
know it from the first step (experiments/speedrun).

Letters in shape comments are those of gpt/modern.py, and N = order + 1: counts after 0, 1, ..., `order` tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIRST_GATES = -4.0, -1.0, 1.0  # before softmax, where the head has 0: 0.4, 9 and 66 % at first; 1 for all longer ones
LEAST = 1e-30  # given to every token, so that all logarithms are finite


@dataclass(frozen=True)
class Copies:
    """What the context adds at each position. Positions can be chosen, as in `copies[:, -1]`.

    ids: (..., S) tokens of the context.
    matches: (..., N, S) bool, true where the n tokens before a column are the last n at the position.
    shares: (..., 1 + N) logarithms of the head's share and of the counts'. Those of counts without a match are -inf.
    """

    ids: Tensor
    matches: Tensor
    shares: Tensor

    def __getitem__(self, where: Any) -> "Copies":
        return Copies(self.ids[where], self.matches[where], self.shares[where])

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(...) ids -> the `mixture` of gpt/loss.py: (...) logarithms of the head's share, and of what the counts give
        to the targets."""
        hits = (self.matches & (self.ids == targets[..., None])[..., None, :]).sum(-1)  # (..., N)
        added = (self.shares[..., 1:].exp() * hits / self.counts()).sum(-1)
        return self.shares[..., 0], added.clamp(min=LEAST).log()

    def mixed(self, logits: Tensor) -> Tensor:
        """(..., V) logits of the head -> (..., V) logarithms of the probabilities."""
        weights = self.shares[..., 1:].exp() / self.counts()  # (..., N)
        weights = torch.einsum("...n,...ns->...s", weights, self.matches.to(weights.dtype))
        added = torch.zeros_like(logits, dtype=torch.float32).scatter_add_(-1, self.ids, weights)
        of_head = self.shares[..., :1] + F.log_softmax(logits.float(), dim=-1)
        return torch.logaddexp(of_head, added.clamp(min=LEAST).log())

    def counts(self) -> Tensor:
        """(..., N) tokens that have followed, at least 1."""
        return self.matches.sum(-1).clamp(min=1)


class Copying(nn.Module):
    """The shares of the head and of the counts: softmax of 0 and of one number for each n, linear in the stream."""

    def __init__(self, width: int, order: int) -> None:
        super().__init__()
        self.order = order
        self.gate = nn.Linear(width, order + 1)
        with torch.no_grad():  # the same shares everywhere at first
            self.gate.weight.zero_()
            self.gate.bias.copy_(torch.tensor([FIRST_GATES[min(n, 2)] for n in range(order + 1)]))

    def forward(self, hidden: Tensor, ids: Tensor, seen: Tensor) -> Copies:
        """(B, T, C) stream, (B, S) ids and a (B, T, S) bool, true where each of the T tokens may look, which it is the
        last one of -> the copies of all T."""
        matches = ngram_matches(ids, seen, self.order)
        gates = self.gate(hidden).float()  # (B, T, N)
        gates = gates.masked_fill(~matches.any(-1), -torch.inf)
        shares = F.log_softmax(F.pad(gates, (1, 0)), dim=-1)
        return Copies(ids[:, None].expand(seen.shape), matches, shares)


def ngram_matches(ids: Tensor, seen: Tensor, order: int) -> Tensor:
    """(B, S) ids and (B, T, S) what each of T tokens sees -> (B, T, N, S), `Copies.matches`."""
    S = ids.shape[1]
    last = torch.where(seen, torch.arange(S, device=ids.device), 0).amax(-1)  # (B, T) the columns of the tokens
    matches = [seen]
    for n in range(order):
        own = ids.gather(1, (last - n).clamp(min=0))  # (B, T) the token n places before each
        before = F.pad(ids, (n + 1, 0))[:, :S]  # (B, S) the token n + 1 places before each column
        is_seen = F.pad(seen, (n + 1, 0))[..., :S]
        matches.append(matches[-1] & is_seen & (own[:, :, None] == before[:, None]))
    return torch.stack(matches, dim=-2)
