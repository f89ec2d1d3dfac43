"""What the machine can do at most: products of matrices and reading memory. `python machine.py` prints it."""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt.machine.rates import read_rate, shortest_duration

READ = 2**29  # bytes, many times what caches hold
NAMES = {"float32": "float32 products", "bfloat16": "bfloat16 products"}


def product_rate(dtype: torch.dtype, device: torch.device, n: int = 2048) -> float:
    """Floating-point operations per second of the fastest of several (n, n) products; of smaller ones where they take
    long, as in bfloat16 on processors that emulate it."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def rate(m: int, at_least: float) -> float:
        x, y = a[:m, :m].contiguous(), b[:m, :m].contiguous()
        return 2 * m**3 / shortest_duration(lambda: x @ y, device, at_least)

    is_emulated = rate(64, 0.05) < 5e9  # several times, as kernels are made in the first
    return rate(256, 0.0) if is_emulated else rate(n, 0.5)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in NAMES:
        rates = [product_rate(getattr(torch, name), device) / 1e9 for _ in range(5)]
        print(f"{NAMES[name]}: {statistics.median(rates):.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f})")
    print(f"memory read: {read_rate(device, READ) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
