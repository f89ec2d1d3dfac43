"""What the machine can do at most: products of matrices and reading memory. `python machine.py` prints it."""

import statistics
import time

import torch

NAMES = {"float32": "float32 products", "bfloat16": "bfloat16 products"}


def product_rate(dtype: torch.dtype, device: torch.device, n: int = 2048) -> float:
    """Floating-point operations per second of the fastest of five (n, n) products; fewer and smaller ones where they
    take long, as bfloat16 does on processors that emulate it."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    small = [t[:64, :64].contiguous() for t in (a, b)]
    seconds(lambda: small[0] @ small[1], device)
    if seconds(lambda: small[0] @ small[1], device) > 64**3 * 2 / 5e9:  # under 5 GFLOP/s: emulated
        small = [t[:256, :256].contiguous() for t in (a, b)]
        return 2 * 256**3 / min(seconds(lambda: small[0] @ small[1], device) for _ in range(2))
    seconds(lambda: a @ b, device)
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def read_rate(device: torch.device) -> float:
    """Bytes per second of summing 512 MB, the fastest of five times."""
    source = torch.ones(2**27, device=device)
    return source.nbytes / min(seconds(source.sum, device) for _ in range(5))


def seconds(work, device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in NAMES:
        rates = [product_rate(getattr(torch, name), device) / 1e9 for _ in range(5)]
        print(f"{NAMES[name]}: {statistics.median(rates):.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f})")
    print(f"memory read: {read_rate(device) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
