"""Defines what training minimises: the loss of a batch, and the metrics of an evaluation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpt.config.schema import METRIC
from gpt.data.batching import Batch
from gpt.loss import cross_entropy, cross_entropy_sum
from gpt.model import LanguageModel


class Objective(Protocol):
    """What gpt/loop.py asks of an objective. `evaluate` returns METRIC, which is minimised, and whatever else it likes.

    A batch says beforehand, as `n_targets`, which weight its loss will have: gradients are divided by the weight of the
    whole step while they are computed, so that micro-batches of any size give the gradient of one batch.
    """

    def loss(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, int]:
        """The sum of the losses of a batch, with a gradient, and its weight, by which sums of batches are divided."""
        ...

    def evaluate(self, model: LanguageModel, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics by name, over all batches. The model is in evaluation mode and there is no gradient."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Next-token prediction: the cross-entropy of each target, weighted alike.

    bytes_per_token: (V,) the length of each token in bytes of text; without it there are no bits per byte.
    """

    bytes_per_token: Tensor | None = None

    def loss(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, int]:
        hidden, targets = scored_positions(model, batch)
        return cross_entropy_sum(hidden, model.head, targets), batch.n_targets

    def evaluate(self, model: LanguageModel, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss per target in nats, its perplexity, and bits per byte of text.

        Targets without bytes (the end of a text) count in the loss but not in the bits per byte.
        """
        loss_sum, n_targets, nats, n_bytes = 0.0, 0, 0.0, 0
        for batch in batches:
            hidden, targets = scored_positions(model, batch)
            losses = cross_entropy(hidden, model.head, targets)
            loss_sum += losses.sum(dtype=torch.float64 if losses.device.type != "mps" else None).item()
            n_targets += len(targets)
            if self.bytes_per_token is not None:
                lengths = self.bytes_per_token[targets]
                nats += losses[lengths > 0].sum().item()
                n_bytes += int(lengths.sum())
        loss = loss_sum / n_targets
        # e^709 is the largest float; NaN stays NaN
        metrics = {METRIC: loss, "val/perplexity": math.exp(loss if not loss > 700 else 700.0)}
        if n_bytes:
            metrics["val/bpb"] = nats / math.log(2) / n_bytes
        return metrics


def scored_positions(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, C) stream and (N,) ids of a batch's N targets; the head is not asked about any other position."""
    hidden = model.hidden(batch.inputs, batch.positions, batch.documents)  # (B, T, C)
    return hidden.flatten(0, 1).index_select(0, batch.scored), batch.targets.flatten()[batch.scored]
