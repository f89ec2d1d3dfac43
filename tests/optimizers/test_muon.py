"""Muon, with each formula compared with what is published of it."""

import math

import pytest
import torch
from conftest import muon_config

from gpt import optim
from gpt.optimizers.muon import SCALES, decay_, orthogonalized, row_normalized, warmed_up

SETTINGS = {key: value for key, value in vars(muon_config()).items() if key in (
    "lr", "weight_decay", "momentum", "nesterov", "scale", "orthogonalization", "cautious_decay", "momentum_warmup",
    "second_moment",
)}  # fmt: skip
SHAPES = [(33, 17), (17, 33), (24, 24), (96, 32)]


def trained(kind, steps=7, **settings):
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = kind(matrices, **settings)
    for step in range(steps):
        sum(((step + 1) * matrix.sin()).sum() for matrix in matrices).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [matrix.detach() for matrix in matrices], optimizer


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", SCALES)
def test_with_the_settings_of_2024_it_is_torchs_own_bit_for_bit(nesterov, scale):
    common = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
    ours, mine = trained(optim.Muon, **(SETTINGS | common | {"scale": scale}))
    torchs, original = trained(torch.optim.Muon, **common, adjust_lr_fn=scale)
    assert all(map(torch.equal, ours, torchs))
    assert [list(state) for state in mine.state.values()] == [list(state) for state in original.state.values()]


# What becomes of singular values after the division by the norm; computed with the published coefficients in float64.
MAPS = {
    "newton_schulz": {0.01: 0.6989, 0.05: 0.7581, 0.1: 0.7121, 0.3: 1.0796, 0.5: 0.7654, 0.8: 1.1192},
    "polar_express": {0.001: 0.8589, 0.01: 1.0271, 0.1: 1.0592},
}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("name", MAPS)
def test_singular_values_become_those_of_the_published_iteration_and_their_vectors_stay(name, shape):
    """Of a matrix of norm 1 whose first singular value makes up what the others lack. Rounded to bfloat16 a small one
    is hidden by the error of the large one, so each is taken alone, with the product that it is the factor of."""
    for value, expected in MAPS[name].items():
        left = torch.linalg.qr(torch.randn(shape[0], 2, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(shape[1], 2, dtype=torch.float64))[0]
        values = torch.tensor([value, (1 - value**2) ** 0.5], dtype=torch.float64)
        update = orthogonalized((left * values @ right.T).float(), name)
        assert update.dtype == torch.bfloat16 and update.shape == shape
        assert (left.T @ update.double() @ right)[0, 0].item() == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("name", "least", "most"), [("newton_schulz", 0.65, 1.2), ("polar_express", 0.8, 1.15)])
def test_all_singular_values_come_near_1(name, least, most):
    """Newton and Schulz's leave 0.68 to 1.13 where none was below 0.01, Polar Express's 0.86 to 1.06 (0.001)."""
    values = torch.linalg.svdvals(orthogonalized(torch.randn(32, 96), name).float())
    assert least < values.min() and values.max() < most


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (24, 24)])
@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("name", MAPS)
def test_in_float32_wide_matrices_take_a_shorter_way_to_the_same_update(name, least, shape):
    """Singular values from `least` to 1; float64 goes the long way."""
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = left * torch.logspace(0, math.log10(least), 24, dtype=torch.float64) @ right
    away = orthogonalized(matrix.float(), name, torch.float32) - orthogonalized(matrix, name, torch.float64)
    assert torch.linalg.matrix_norm(away, 2) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (3, 9)])
def test_a_matrix_of_zeros_stays_one(shape, dtype):
    assert not orthogonalized(torch.zeros(shape), "newton_schulz", dtype).any()


def test_the_scales_are_those_of_jordan_and_of_moonlight():
    assert [SCALES["original"](*shape) for shape in [(16, 4), (4, 16), (4, 4)]] == [2.0, 1.0, 1.0]
    assert [SCALES["match_rms_adamw"](*shape) for shape in [(16, 4), (4, 16)]] == pytest.approx([0.8, 0.8])
    matrix = torch.linalg.qr(torch.randn(64, 16))[0] * SCALES["match_rms_adamw"](64, 16)
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2)  # the RMS of AdamW's update


def test_momentum_warms_up_linearly_and_stays():
    assert [warmed_up(0.95, step, 4) for step in (0, 2, 4, 100)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert warmed_up(0.95, 0, 0) == 0.95


def test_rows_are_divided_by_their_own_running_root_mean_square_and_the_norm_is_kept():
    update, squares = torch.tensor([[3.0, 3.0], [0.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    normalized = row_normalized(update, squares, beta=0.5)
    assert squares.flatten().tolist() == [5.0, 4.0]  # (1 + 9) / 2 and (0 + 8) / 2
    rows = torch.tensor([[3 / 5**0.5, 3 / 5**0.5], [0.0, 2.0]])
    assert torch.allclose(normalized, rows * (34**0.5 / rows.norm()))
    assert normalized.norm().item() == pytest.approx(update.norm().item())


def test_cautious_decay_spares_the_weights_that_an_update_moves_away_from_0():
    weights, update = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([2.0, -2.0, -2.0, 0.0])
    decay_(weights, update, 0.25, cautious=True)
    assert weights.tolist() == [0.75, -0.75, 1.0, -0.75]  # of an update of 0 all is left to decay
    decay_(weights, update, 0.5, cautious=False)
    assert weights.tolist() == [0.375, -0.375, 0.5, -0.375]


def test_momentum_warms_up_by_the_optimizers_own_steps():
    """The first update of momentum 0.85 is that of a constant 0.85, and the second is not."""
    warming, constant = {"momentum_warmup": 10}, {"momentum": 0.85}
    for steps in (1, 2):
        (a, _), (b, _) = (trained(optim.Muon, steps, **(SETTINGS | changes)) for changes in (warming, constant))
        assert all(map(torch.equal, a, b)) == (steps == 1)
