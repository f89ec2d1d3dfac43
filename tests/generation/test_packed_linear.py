"""Layers in bfloat16, int8 and int4: their codes, and their products against those of float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt.generation import packed_linear
from gpt.generation.packed_linear import GROUP, Bfloat16Linear, Int4Linear, Int8Linear, int4_codes, int8_codes

SHAPES = [(96, 64), (50, 32), (7, 33), (3, 12), (64, 256)]  # (N, K): whole groups and not, rows for the padding
EPS = 2.0**-8  # of bfloat16: a number is rounded by at most half of it


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestCodes:
    def test_int8_codes_of_a_known_row(self):
        codes, scales = int8_codes(torch.tensor([[127.0, -64.4, 0.6, 0.0], [-0.5, 0.25, 0.0, 0.0], [0.0] * 4]))
        assert codes.tolist() == [[127, -64, 1, 0], [-127, 64, 0, 0], [0] * 4]
        assert scales[0] == 1 and math.isclose(scales[1], 0.5 / 127, rel_tol=EPS) and scales[2] > 0

    def test_int4_codes_follow_the_formula_that_torch_uses(self):
        """The vector: 0 to 15 in steps of 1 have scale (15 - 0) / 15 = 1 and zero 0 + 8 * 1 = 8."""
        codes, grid = int4_codes(torch.arange(16.0).repeat(2)[None])
        assert codes.tolist() == [[*range(16), *range(16)]]
        assert grid.tolist() == [[[1.0, 8.0]]]

    def test_what_lies_on_the_grid_is_found_again(self):
        layer = Int8Linear.of(numbers(40, 70))
        codes, scales = int8_codes(layer.dequantised(torch.float32))
        assert torch.equal(codes, layer.codes) and torch.equal(scales, layer.scales)
        codes = torch.randint(0, 16, (8, 2 * GROUP), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 15  # a grid is known by its ends
        grid = torch.stack([torch.full((2, 8), 0.25), torch.full((2, 8), -0.5)], dim=-1).bfloat16()
        layer = Int4Linear(2 * GROUP, None, codes[:, ::2] | codes[:, 1::2] << 4, grid)
        again = int4_codes(layer.dequantised(torch.float32))
        assert torch.equal(again[0], codes) and torch.equal(again[1], grid)
        assert torch.equal(layer.codes, codes)

    @pytest.mark.parametrize("offset", [0.0, 1.0, -100.0])
    def test_no_number_is_further_from_its_code_than_half_a_step(self, offset):
        weight = numbers(16, 64) * 0.02 + offset
        codes, scales = int8_codes(weight)
        assert ((codes * scales.float()[:, None] - weight).abs() <= scales.float()[:, None] * 0.501).all()
        layer = Int4Linear.of(weight)
        steps = layer.grid[..., 0].t().float().repeat_interleave(GROUP, dim=1)
        error = (layer.dequantised(torch.float32) - weight).abs()
        assert (error <= steps * (0.5 + 8 * EPS)).all()  # a scale is rounded, and the last code is 8 steps from zero

    def test_a_constant_group_is_exact_up_to_the_rounding_of_bfloat16(self):
        weight = torch.full((4, GROUP), 0.3)
        assert (Int4Linear.of(weight).dequantised(torch.float32) - 0.3).abs().max() <= 0.3 * EPS


def in_order(is_packed: bool, monkeypatch) -> type[Bfloat16Linear]:
    """Layers whose matrices are in oneDNN's order or in the usual one, whichever is faster here."""
    if is_packed and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no products of bfloat16")
    monkeypatch.setattr(packed_linear, "is_faster_packed", lambda: is_packed)
    return Bfloat16Linear


@pytest.fixture(params=["bfloat16", "bfloat16, packed", "int8", "int4"])
def layer(request, monkeypatch):
    integers = {"int8": Int8Linear, "int4": Int4Linear}
    return integers.get(request.param) or in_order("packed" in request.param, monkeypatch)


@pytest.mark.parametrize("shape", SHAPES)
class TestProducts:
    @pytest.mark.parametrize("rows", [1, 3, 9, 33])
    @pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
    def test_a_product_is_that_of_float64_up_to_rounding(self, layer, shape, rows, products):
        packed = layer.of(numbers(*shape), numbers(shape[0], seed=1))
        packed.products = products
        x = numbers(rows, shape[1], seed=2).bfloat16()
        matrix = packed.dequantised(torch.float32).double()
        wanted = x.double() @ matrix.t() + packed.bias.double()
        # Weights that are dequantised are rounded, sums are, and so is what the bias is added to.
        bound = EPS * (x.double().abs() @ matrix.t().abs() + 2 * wanted.abs() + packed.bias.double().abs())
        got = packed(x.float())
        assert got.dtype == torch.bfloat16 and got.shape == (rows, shape[0])
        assert ((got - wanted).abs() <= bound).all()

    def test_leading_dimensions_are_kept_and_rows_do_not_mix(self, layer, shape):
        packed = layer.of(numbers(*shape))
        x = numbers(2, 5, shape[1])
        y = packed(x)
        assert y.shape == (2, 5, shape[0])
        torch.testing.assert_close(packed(x[1, 4]), y[1, 4], rtol=0.02, atol=0.05)

    def test_nan_in_a_row_comes_out_of_it(self, layer, shape):
        x = numbers(1, shape[1])
        x[0, 3] = torch.nan
        assert layer.of(numbers(*shape))(x).isnan().all()


@pytest.mark.parametrize(("layer", "loss"), [(Bfloat16Linear, 0.0017), (Int8Linear, 0.008), (Int4Linear, 0.08)])
def test_normal_weights_lose_as_much_as_their_grid_is_coarse(layer, loss):
    """bfloat16: 2^-9 / sqrt(3) at most 2^-9 sqrt(1/3) = 0.0017 with the spread of numbers within a power of two; int8
    of 768 numbers: 3.2 sigma / 127 / sqrt(12) = 0.0073; int4 of 32: 4.1 sigma / 15 / sqrt(12) = 0.079."""
    weight = numbers(64, 768)
    error = layer.of(weight).dequantised(torch.float32) - weight
    assert 0.8 * loss < error.norm() / weight.norm() < loss * 1.05


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_packed_matrix_is_kept_once_and_is_the_same_matrix(is_packed, monkeypatch):
    layer = in_order(is_packed, monkeypatch).of(numbers(50, 32))
    assert layer.matrix.is_mkldnn == is_packed
    assert torch.equal(layer.dequantised(torch.float32), numbers(50, 32).bfloat16().float())
    assert [tensor.nbytes for tensor in layer.buffers()] == [50 * 32 * 2]


NO_FBGEMM = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="it is x86's")


@NO_FBGEMM
def test_int8_products_are_the_same_by_either_kernel(monkeypatch):
    weight, x = numbers(70, 96), numbers(1, 96).bfloat16()
    integers = Int8Linear.of(weight)
    monkeypatch.setattr(packed_linear, "FBGEMM", "none")
    whole = Int8Linear.of(weight)
    assert integers.packed is not None and whole.packed is None
    torch.testing.assert_close(integers(x), whole(x), rtol=EPS, atol=0.02)


@NO_FBGEMM
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
def test_a_row_for_int8_has_14_bits_below_its_largest_number(outlier):
    """The error of an element is at most half of peak / 63 / 126, and it is as large as that only for each by itself:
    of 256 elements with weights w the sum's is at most that times the sum of |w|."""
    packed = Int8Linear.of(numbers(64, 256))
    x = numbers(1, 256, seed=1).bfloat16()
    x[0, 7] = outlier * x.abs().max()
    matrix = packed.dequantised(torch.float32).double()
    wanted = x.double() @ matrix.t()
    bound = x.double().abs().max() / 63 / 126 / 2 * matrix.abs().sum(1) * 1.01 + wanted.abs() * EPS
    assert ((packed(x) - wanted).abs() <= bound).all()


def test_extreme_codes_and_rows_of_zeros_are_exact():
    weight = torch.arange(-127.0, 128.0)[:, None].repeat(1, GROUP)
    weight[:, 0] = 127  # so that every scale is 1
    x = F.one_hot(torch.tensor([5]), GROUP).float()
    assert Int8Linear.of(weight)(x)[0].tolist() == torch.arange(-127.0, 128.0).bfloat16().tolist()
    assert not Int8Linear.of(weight)(0 * x).any()
