"""Computes how likely a model finds given texts: nats, tokens and bytes of every window of their tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gpt.data.batching import Segments, Split, collate, eval_segments
from gpt.data.packing import limit_slots
from gpt.loss import cross_entropy
from gpt.model import LanguageModel
from gpt.objective import scored_positions
from gpt.sampling import eval_mode, not_finite

ALL = 2**62  # targets


def windows(split: Split, context_length: int, mask: str, stride: int | None = None) -> Segments:
    """Windows in which each target of a split is scored once, see batching.eval_segments."""
    return eval_segments(split, context_length, mask, ALL, stride)


def grouped(segments: Segments, slots: int) -> list[list[int]]:
    """Numbers of windows of like length, so many that rows times the longest stays within `slots`."""
    order = np.argsort(-segments.lengths, kind="stable")
    groups = limit_slots(segments.lengths[order].tolist(), slots)
    return [order[group].tolist() for group in groups]


def score(
    model: LanguageModel, split: Split, segments: Segments, which: Sequence[int], bytes_per_token: np.ndarray
) -> list[dict[str, Any]]:
    """For each of some windows: its nats and targets, and the nats and bytes of those targets that are text. All rows
    are computed together. Raises UserError (4) for a loss that is not finite."""
    batch = collate(split.ids, segments.take(np.array(which)), [[i] for i in range(len(which))])
    on_device = batch.to(model.head.device)
    with eval_mode(model), torch.inference_mode():
        hidden, targets, mixture = scored_positions(model, on_device)
        losses = cross_entropy(hidden, model.output_matrix(), targets, model.logit_softcap, mixture)
    losses = losses.cpu().double().numpy()
    if not np.isfinite(losses).all():
        raise not_finite("losses")
    rows = batch.scored.numpy() // batch.inputs.shape[1]
    sizes = bytes_per_token[batch.targets.flatten()[batch.scored].numpy()]

    def sums(values: np.ndarray) -> list[float]:
        return np.bincount(rows, values, minlength=len(which)).tolist()

    columns = {"nats": losses, "tokens": np.ones(len(rows)), "text nats": losses * (sizes > 0), "bytes": sizes}
    totals = {name: sums(values) for name, values in columns.items()}
    return [
        {name: total[i] if "nats" in name else int(total[i]) for name, total in totals.items()}
        for i in range(len(which))
    ]


def of_documents(
    model: LanguageModel, split: Split, which: Sequence[int], context_length: int, bytes_per_token: np.ndarray,
    slots: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """What `score` gives, of the whole response of each of some documents, however long it is."""
    alone = [Split(split.ids, split.documents[i : i + 1], split.name) for i in which]
    of_each = [windows(one, context_length, "response") for one in alone]
    owners = [number for number, own in enumerate(of_each) for _ in own.start]
    segments = Segments(*map(np.concatenate, zip(*of_each, strict=True)))
    sums: list[dict[str, Any]] = [{"nats": 0.0, "tokens": 0, "text nats": 0.0, "bytes": 0} for _ in which]
    for group in grouped(segments, slots):
        for i, row in zip(group, score(model, split, segments, group, bytes_per_token), strict=True):
            for key, value in row.items():
                sums[owners[i]][key] += value
    return sums
