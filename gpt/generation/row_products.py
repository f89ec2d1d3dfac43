"""Multiplies matrices of bfloat16 with one row on a CPU, and measures which of torch's kernels does it faster.

One row is all that the next token of one text takes, and no kernel is the fastest on all processors: on an Intel Xeon
with AMX oneDNN takes 24 ms for the matrices of GPT-2 small in its own order, 35 ms in the usual one, and torch's own
kernel 38 ms (one thread); on an AMD EPYC torch's own is faster than oneDNN in the usual order
(experiments/generation/README.md).
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

PROBE = 3072, 768  # rows and columns of the matrix that kernels are compared with
SLACK = 1.3  # times as long as torch's own kernel that oneDNN's may take: a near tie falls the same way each time


def row_product(matrix: Tensor, row: Tensor) -> Tensor:
    """(N, K) bfloat16 times (K,) -> (N,), on CPUs without oneDNN, which is slow with a matrix in the usual order."""
    if matrix.device.type != "cpu":
        return torch.mv(matrix, row)
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return torch.mv(matrix, row)
    finally:
        torch.backends.mkldnn.enabled = before


def packed(matrix: Tensor) -> Tensor:
    """The same (N, K) matrix of bfloat16 in oneDNN's own order, a layout that only `packed_product` reads."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix, 1)


def packed_product(matrix: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """A `packed` (N, K) matrix times (M, K) rows, one or more, plus an (N,) bias -> (M, N)."""
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")


@cache
def is_faster_packed() -> bool:
    """Whether `packed_product` multiplies one row faster than `row_product` does."""
    if not torch.backends.mkldnn.enabled or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    matrix = torch.ones(PROBE, dtype=torch.bfloat16)
    row, in_own_order = matrix[:1], packed(matrix)
    own = least_seconds(lambda: row_product(matrix, row[0]))
    return least_seconds(lambda: packed_product(in_own_order, row)) < SLACK * own


def least_seconds(compute: Callable[[], object], times: int = 3) -> float:
    """Seconds on the processor, by one thread, of the fastest of a few runs: where other processes are busy, threads
    wait for each other for longer than they compute."""
    threads, taken = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(times):
            start = time.thread_time()
            compute()
            taken.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(taken)
