"""Defines linear layers whose weights are bfloat16, int8 or int4, which a single row is multiplied with as stored.

Letters in shape comments: M rows, K numbers of an input, N of an output, G groups of GROUP numbers of an input.

One token is a product of each matrix with one row, and takes as long as reading the matrix takes: half of the bytes are
twice as fast. Inputs and outputs are bfloat16, for which alone the kernels on x86 are written for vectors; sums are in
float32. Many rows (a prompt, a batch) take as long as multiplying takes: for them the weights are turned into numbers
that a matrix product takes. Symmetric int8 for each row of the matrix, int4 between the least and the largest number of
each group (Dettmers et al., 2022; Frantar et al., 2022).
"""

import warnings
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.generation.row_products import is_faster_packed, packed, packed_product, row_product

GROUP = 32  # numbers of an input that share a scale and a zero in int4: 5 bits for each weight
FEW = 8  # rows that int8 and int4 kernels take less time for than turning the matrix into numbers
ALIGNMENT = 64  # rows of a matrix that torch's int4 packing for CPUs takes at a time
INNER_TILES = 8  # of torch's int4 packing for CUDA and MPS, which allows 2, 4 and 8
FBGEMM = "fbgemm"  # the library of torch's integer products on x86
LEVELS = 63  # integers that a row is rounded to on either side of 0
PARTS = torch.tensor([1.0 * LEVELS, LEVELS * 2 * LEVELS])[:, None, None]  # how many there are to a row's largest number
LEAST = 1e-30  # largest number of a row below which it counts as zeros


class PackedLinear(nn.Module, ABC):
    """(..., K) -> (..., N) in bfloat16. `products`: the type of matrix products, float32 where the processor has none
    in bfloat16."""

    few = FEW
    products = torch.bfloat16
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That the weights are on."""

    @classmethod
    @abstractmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """The layer of an (N, K) matrix and an (N,) bias of floating-point numbers."""

    @classmethod
    @abstractmethod
    def shapes(cls, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Type and shape of each tensor that such a layer is saved as, but for the bias."""

    @abstractmethod
    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), the matrix that the layer multiplies with."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N), of a few rows."""

    def matrix_product(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N), of any number of rows."""
        y = F.linear(x.to(self.products), self.dequantised(self.products)).bfloat16()
        return y if self.bias is None else y.add_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (M, K)
        y = self.product(rows) if len(rows) <= self.few else self.matrix_product(rows)  # (M, N)
        return y.view(*x.shape[:-1], self.out_features)

    def pack(self) -> None:
        """Prepares `product` for the device and the processor that the weights are on: never saved, as it differs."""


class Bfloat16Linear(PackedLinear):
    """Weights rounded to bfloat16, in the order in which oneDNN multiplies one row with them where that is faster."""

    def __init__(self, in_features: int, bias: Tensor | None, matrix: Tensor) -> None:
        super().__init__(in_features, len(matrix), bias)
        self.register_buffer("matrix", matrix)  # (N, K), and once it is packed of a layout that only oneDNN reads
        self.pack()

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        return cls(weight.shape[1], bias, weight.detach().bfloat16())

    @classmethod
    def shapes(cls, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        return {"matrix": (torch.bfloat16, [out_features, in_features])}

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.matrix.to_dense() if self.matrix.is_mkldnn else self.matrix).to(dtype)

    def pack(self) -> None:
        if self.matrix.device.type == "cpu" and is_faster_packed():
            self.matrix = packed(self.matrix)
        self.is_packed = self.matrix.is_mkldnn
        self.few = FEW if self.is_packed else 1

    def product(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self.is_packed:
            return packed_product(self.matrix, x, self.bias)
        y = row_product(self.matrix, x[0])[None]
        return y if self.bias is None else y.add_(self.bias)

    def matrix_product(self, x: Tensor) -> Tensor:
        own_order = self.is_packed and self.products == torch.bfloat16
        return self.product(x) if own_order else super().matrix_product(x)


class Int8Linear(PackedLinear):
    """w[n, k] = scales[n] codes[n, k], with codes from -127 to 127."""

    def __init__(self, in_features: int, bias: Tensor | None, codes: Tensor, scales: Tensor) -> None:
        super().__init__(in_features, len(codes), bias)
        self.register_buffer("codes", codes)  # (N, K) int8
        self.register_buffer("scales", scales)  # (N,) bfloat16
        self.pack()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        return cls(weight.shape[1], bias, *int8_codes(weight.detach()))

    @classmethod
    def shapes(cls, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        return {"codes": (torch.int8, [out_features, in_features]), "scales": (torch.bfloat16, [out_features])}

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scales.float()[:, None]).to(dtype)

    def matrix_product(self, x: Tensor) -> Tensor:
        # The codes are exact in bfloat16, so scales come after the sums: nothing more is rounded than the sums are.
        y = F.linear(x.to(self.products), self.codes.to(self.products)).bfloat16()
        return y.mul_(self.scales) if self.bias is None else torch.addcmul(self.bias, y, self.scales)

    def pack(self) -> None:
        """On x86 torch's int8 product with rows of bfloat16 takes more than twice as long as reading the codes does
        (experiments/generation/README.md), that of fbgemm with rows of integers hardly longer."""
        self.packed = None
        self.wide_bias = None if self.bias is None else self.bias.float()
        if self.codes.device.type == "cpu" and FBGEMM in torch.backends.quantized.supported_engines:
            before = torch.backends.quantized.engine
            torch.backends.quantized.engine = FBGEMM
            with warnings.catch_warnings(action="ignore"):  # that tensors of this type are deprecated
                zeros = torch.zeros(self.out_features, dtype=torch.long)
                matrix = torch._make_per_channel_quantized_tensor(self.codes, self.scales.double(), zeros, 0)
                self.packed = torch.ops.quantized.linear_prepack(matrix, None)
            torch.backends.quantized.engine = before

    def product(self, x: Tensor) -> Tensor:
        if self.packed is None:
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.codes, self.scales)
            return y if self.bias is None else y.add_(self.bias)
        # A row of integers from -63 to 63, and one of what their rounding leaves out, 126 times: together 14 bits below
        # the row's largest number, so that weights alone lose something. Sums of products of 7 bits fit processors of
        # before VNNI, too. Reading the weights takes as long for two rows as for one. Each operator costs a token some
        # microseconds in every layer, so they are few.
        x = x.float()
        peak = x.abs().amax(1, keepdim=True).clamp_(min=LEAST)  # (M, 1)
        rows = x * (PARTS / peak)  # (2, M, K)
        rows[1].sub_(rows[0].round_(), alpha=2 * LEVELS)
        sums = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows.view(-1, self.in_features), 1.0, LEVELS + 1, self.packed
        )  # (2M, N)
        sums, unit = torch.add(sums[: len(x)], sums[len(x) :], alpha=0.5 / LEVELS), peak / LEVELS
        return (sums * unit if self.bias is None else torch.addcmul(self.wide_bias, sums, unit)).bfloat16()


class Int4Linear(PackedLinear):
    """w[n, k] = scale (code - 8) + zero, with codes from 0 to 15, and a scale and a zero for each group of k.

    nibbles: (N, K / 2), two codes in a byte, the even one in the low half. grid: (G, N, 2), scales and zeros.
    """

    few = 32  # as FEW: here, turning the matrix into numbers takes seven times as long as from int8

    def __init__(self, in_features: int, bias: Tensor | None, nibbles: Tensor, grid: Tensor) -> None:
        super().__init__(in_features, len(nibbles), bias)
        self.register_buffer("nibbles", nibbles)  # uint8; K is padded to whole groups
        self.register_buffer("grid", grid)  # bfloat16
        self.pack()

    @property
    def device(self) -> torch.device:
        return self.nibbles.device

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        codes, grid = int4_codes(padded(weight.detach()))
        return cls(weight.shape[1], bias, codes[:, ::2] | codes[:, 1::2] << 4, grid)

    @classmethod
    def shapes(cls, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        groups = -(-in_features // GROUP)
        nibbles, grid = [out_features, groups * GROUP // 2], [groups, out_features, 2]
        return {"nibbles": (torch.uint8, nibbles), "grid": (torch.bfloat16, grid)}

    @property
    def codes(self) -> Tensor:
        """(N, K) uint8, one code in a byte."""
        return torch.stack([self.nibbles & 15, self.nibbles >> 4], dim=-1).flatten(1)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        # Along N, as numbers beside each other then have scales beside each other: a fifth of the time.
        scales, zeros = (part.to(dtype)[:, None] for part in self.grid.unbind(-1))  # (G, 1, N)
        numbers = scales.new_empty(len(self.grid), GROUP // 2, 2, self.out_features)
        for half, codes in enumerate((self.turned & 15, self.turned >> 4)):  # (K / 2, N)
            groups = codes.to(dtype).sub_(8).view(len(self.grid), GROUP // 2, self.out_features)
            numbers[:, :, half] = torch.addcmul(zeros, groups, scales)
        return numbers.view(-1, self.out_features)[: self.in_features].t()

    def pack(self) -> None:
        self.turned = self.nibbles.t().contiguous()  # (K / 2, N)
        if self.nibbles.device.type == "cpu":
            more = -self.out_features % ALIGNMENT
            codes = F.pad(self.codes, (0, 0, 0, more)).int()
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.packed_grid = F.pad(self.grid, (0, 0, 0, more)) if more else self.grid
            self.multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:  # where the even code is in the high half of a byte
            swapped = self.nibbles << 4 | self.nibbles >> 4
            self.packed = torch.ops.aten._convert_weight_to_int4pack(swapped, INNER_TILES)
            self.packed_grid, self.multiply = self.grid, torch.ops.aten._weight_int4pack_mm

    def product(self, x: Tensor) -> Tensor:
        y = self.multiply(padded(x.bfloat16()), self.packed, GROUP, self.packed_grid)  # (M, N or more)
        y = y[:, : self.out_features] if y.shape[1] > self.out_features else y
        return y if self.bias is None else y.add_(self.bias)


def padded(x: Tensor) -> Tensor:
    """(M, K) with zeros up to a whole number of groups."""
    more = -x.shape[1] % GROUP
    return F.pad(x, (0, more)) if more else x


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> (N, K) int8 codes and (N,) bfloat16 scales: the largest number of a row is 127 scales.

    Codes are of the scale as it is rounded, so that rounding it costs nothing. A row of zeros has the least scale.
    """
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny)
    codes = (weight / scales.float()[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> (N, K) uint8 codes and the (G, N, 2) bfloat16 grid of scales and zeros. K is a multiple of GROUP.

    scale = (largest - least) / 15, zero = least + 8 scale. Where zero is rounded the scale grows, so that the grid
    still reaches from the least number to the largest.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # (N, G, GROUP)
    least, largest = groups.aminmax(dim=-1)
    zeros = (least + (largest - least) / 15 * 8).bfloat16()  # (N, G)
    scales = torch.maximum((largest - zeros.float()) / 7, (zeros.float() - least) / 8).bfloat16()
    scales = scales.clamp(min=torch.finfo(torch.bfloat16).tiny)
    codes = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return codes.flatten(1).to(torch.uint8), torch.stack([scales, zeros], dim=-1).transpose(0, 1).contiguous()
