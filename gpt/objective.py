"""Defines what training minimises: the loss of a batch, and the metrics of an evaluation.

The fields of an objective are its settings, which conf/objective/ has the values of. They are checked before the
seconds that torch takes to load, so torch is imported where it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Protocol

from gpt.config.fields import section
from gpt.config.schema import METRIC
from gpt.machine.ranks import parts

if TYPE_CHECKING:
    from torch import Tensor

    from gpt.data.batching import Batch
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
        """Metrics by name, over all batches. The model is in evaluation mode and there is no gradient.

        With several processes, each of them is asked, and gives the same answer; gpt/machine/ranks.py's `parts` lets
        them share the work.
        """
        ...


@section
class NextToken:
    """Next-token prediction: the cross-entropy of each target, weighted alike."""

    name: Literal["next_token"]

    def loss(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, int]:
        from gpt.loss import cross_entropy_sum

        hidden, targets, mixture = scored_positions(model, batch)
        return cross_entropy_sum(hidden, model.head, targets, model.logit_softcap, mixture), batch.n_targets

    def evaluate(self, model: LanguageModel, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss per target in nats, its perplexity, and bits per byte of text where batches know the bytes.

        Targets without bytes (the end of a text) count in the loss but not in the bits per byte.
        """
        import torch

        from gpt.loss import cross_entropy

        loss_sum, n_targets, nats, n_bytes = 0.0, 0, 0.0, 0
        batches, total = parts(batches)
        for batch in batches:
            hidden, targets, mixture = scored_positions(model, batch)
            losses = cross_entropy(hidden, model.head, targets, model.logit_softcap, mixture)
            loss_sum += losses.sum(dtype=torch.float64 if losses.device.type != "mps" else None).item()
            n_targets += len(targets)
            if batch.target_bytes is not None:
                nats += losses[batch.target_bytes > 0].sum().item()
                n_bytes += int(batch.target_bytes.sum())
        loss_sum, n_targets, nats, n_bytes = total([loss_sum, n_targets, nats, n_bytes])
        loss = loss_sum / n_targets
        # e^709 is the largest float; NaN stays NaN
        metrics = {METRIC: loss, "val/perplexity": math.exp(loss if not loss > 700 else 700.0)}
        if n_bytes:
            metrics["val/bpb"] = nats / math.log(2) / n_bytes
        return metrics


NEXT_TOKEN = NextToken("next_token")
OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}  # by objective.name


def scored_positions(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """(N, C) stream, (N,) ids of a batch's N targets, and what is mixed in there, see gpt/loss.py; the head is not
    asked about any other position."""
    hidden = model.hidden(batch.inputs, batch.positions, batch.documents)  # (B, T, C)
    copies = model.copies(hidden, batch.inputs, batch.documents)
    mixture = None
    if copies is not None:
        kept, added = (each.flatten()[batch.scored] for each in copies.of(batch.targets))
        mixture = kept, added
    return hidden.flatten(0, 1).index_select(0, batch.scored), batch.targets.flatten()[batch.scored], mixture
