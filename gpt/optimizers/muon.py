"""Muon: momentum for matrices, whose updates are orthogonalised (Jordan et al., 2024), with what came since.

torch.optim.Muon is the same where the settings are those of 2024; a test compares them bit for bit. It knows no other
polynomial for each iteration, no cautious decay, no second moment and no momentum that changes.

Letters in shape comments: R rows (outputs of a layer), C columns (its inputs).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gpt.files.tensor_shards import first_rows, own_rows

WIDE = 2  # times as many columns as rows from which on products of rows with rows are what is iterated, in float32
EPS = 1e-7  # smallest norm that is divided by; as in torch.optim.Muon
FIRST_MOMENTUM = 0.85  # from which momentum warms up, as in modded-nanogpt and nanochat
MARGIN = 1.01  # Polar Express expects singular values up to 1 and rounding may exceed that (Amsel et al., 2025)

Coefficients = Sequence[tuple[float, float, float]]
# By name, what the norm is multiplied by, and (a, b, c) of each iteration x <- a x + b x^3 + c x^5 of singular values.
ORTHOGONALIZATIONS: dict[str, tuple[float, Coefficients]] = {
    # Steep at 0, so that five iterations are enough; ends between 0.68 and 1.13 (Jordan et al., 2024).
    "newton_schulz": (1.0, [(3.4445, -4.7750, 2.0315)] * 5),
    # Each the best for what the one before has left (Amsel et al., 2025, "The Polar Express"), as nanochat has them.
    "polar_express": (MARGIN, [
        (8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606),
        (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324),
    ]),
}  # fmt: skip
# By name, the factor of the update of an (R, C) matrix.
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),  # Jordan et al., 2024
    # An orthogonal matrix has RMS 1 / sqrt(max(R, C)); 0.2 is about AdamW's (Liu et al., 2025, "Muon is Scalable").
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def orthogonalized(matrix: Tensor, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(R, C) -> (R, C) in `dtype`: the same singular vectors, all singular values near 1. See ORTHOGONALIZATIONS."""
    margin, coefficients = ORTHOGONALIZATIONS[name]
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype)
    if is_tall:
        x = x.T  # (C, R): products with the smaller side are less work
    x = x / (x.norm() * margin).clamp(min=EPS)
    if dtype == torch.float32 and WIDE * x.size(0) <= x.size(1):
        x = _polynomial_of_gram(x @ x.T, coefficients) @ x
    else:
        for a, b, c in coefficients:
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _polynomial_of_gram(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """(R, R) products of the rows of x -> (R, R), what the iterations multiply x with from the left: q_k = p_k q_(k-1)
    with p_k = a + b g_k + c g_k^2, where g_(k+1) = p_k g_k p_k. All are polynomials of one matrix, so their order does
    not matter, and a wide x is multiplied with twice instead of ten times. In bfloat16 they would not stay near enough.
    """
    q = None
    for number, (a, b, c) in enumerate(coefficients, 1):
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal().add_(a)
        q = p if q is None else p @ q
        if number < len(coefficients):
            gram = p @ gram @ p
    return q


def warmed_up(momentum: float, step: int, length: int) -> float:
    """The momentum of step `step` (from 0): linear from FIRST_MOMENTUM to `momentum` over `length` steps."""
    if step >= length:
        return momentum
    return FIRST_MOMENTUM + step / length * (momentum - FIRST_MOMENTUM)


def row_normalized(update: Tensor, squares: Tensor, beta: float) -> Tensor:
    """(R, C) -> (R, C) of the same norm, each row divided by the root of its running mean square, (R, 1), which this
    step is averaged into: NorMuon (Li et al., 2025)."""
    update = update.to(squares.dtype)
    squares.lerp_(update.square().mean(dim=1, keepdim=True), 1 - beta)
    normalized = update / squares.sqrt().clamp(min=EPS)
    return normalized * (update.norm() / normalized.norm().clamp(min=EPS))


def decay_(weights: Tensor, update: Tensor, amount: float, cautious: bool) -> None:
    """Shrinks weights, from which `update` is going to be subtracted, by a part `amount`; where `cautious`, only those
    that it moves towards 0 or leaves (Chen et al., 2025, "Cautious Weight Decay")."""
    if cautious:
        weights.sub_(weights * (update * weights >= 0), alpha=amount)
    else:
        weights.mul_(1 - amount)


class Muon(torch.optim.Optimizer):
    """Muon for matrices. The arguments are those of MuonConfig in gpt/config/optimizers.py, and `dtype`, that of the
    products which orthogonalise."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, momentum: float, nesterov: bool, scale: str,
        orthogonalization: str, cautious_decay: bool, momentum_warmup: int, second_moment: float | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        settings = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    update = self._orthogonalized(self._direction(matrix, group), group)
                    self._subtract(matrix, update, group)

    def _orthogonalized(self, direction: Tensor, group: dict[str, Any]) -> Tensor:
        return orthogonalized(direction, group["orthogonalization"], group["dtype"])

    def _direction(self, matrix: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The momentum after this step, or what Nesterov's rule makes of it; of a sharded matrix this rank's rows."""
        gradient, state, momentum = own_rows(matrix.grad), self.state[matrix], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        if group["momentum_warmup"]:
            step = state.setdefault("step", torch.zeros(()))
            momentum = warmed_up(momentum, int(step), group["momentum_warmup"])
            step += 1
        buffer = own_rows(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum) if group["nesterov"] else buffer

    def _subtract(self, matrix: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
        """Takes an orthogonalised update, of a sharded matrix this rank's rows, from the weights, and decays these."""
        weights = own_rows(matrix)
        if group["second_moment"] is not None:
            squares = self.state[matrix].setdefault("row_squares", torch.zeros_like(weights[:, :1]))
            update = row_normalized(update, squares, group["second_moment"])
        decay_(weights, update, group["lr"] * group["weight_decay"], group["cautious_decay"])
        weights.add_(update, alpha=-group["lr"] * SCALES[group["scale"]](*matrix.shape))


class ShardedMuon(Muon):
    """Muon for matrices that are sharded: every rank has some rows of each.

    Momentum is a matter of rows, an update is not: it takes the whole matrix. So each rank gathers one of as many
    matrices as there are ranks, turns it into the update, and sends every rank its rows of that. Nobody computes what
    another does, or holds more than one matrix.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            n_ranks = matrices[0].device_mesh.size() if matrices else 1
            for start in range(0, len(matrices), n_ranks):
                self._step(matrices[start : start + n_ranks], group)

    def _step(self, matrices: list[Any], group: dict[str, Any]) -> None:
        """A step for at most one matrix of each rank: rank r computes the update of the one numbered r."""
        import torch.distributed as dist

        mesh, rows = matrices[0].device_mesh, [self._direction(matrix, group) for matrix in matrices]
        # numbers that this rank has of each one's matrix, and that each has of this rank's
        here = [part.numel() for part in rows] + [0] * (mesh.size() - len(rows))
        there = [0] * mesh.size()
        own = matrices[mesh.get_local_rank()] if mesh.get_local_rank() < len(matrices) else None
        if own is not None:
            there = [own.shape[1] * (last - first) for first, last in pairwise(first_rows(own))]
        sent = torch.cat([part.flatten() for part in rows])
        gathered = sent.new_empty(sum(there))
        dist.all_to_all_single(gathered, sent, there, here, group=mesh.get_group())
        if own is not None:
            update = self._orthogonalized(gathered.view(own.shape), group)
            gathered = update.to(sent.dtype).flatten()
        dist.all_to_all_single(sent, gathered, here, there, group=mesh.get_group())
        for matrix, part, update in zip(matrices, rows, sent.split(here[: len(rows)]), strict=True):
            self._subtract(matrix, update.view_as(part), group)
