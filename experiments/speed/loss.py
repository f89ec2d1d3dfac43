"""Times gpt/loss.py against the two lines that it equals and torch's own chunked version.

    python experiments/speed/loss.py --turns 10

Forward and backward of the head at mini's shapes: 2,048 positions, 384 wide, 50,257 tokens. All take their turn in one
process, in each precision; medians are printed with the least and the most.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt.loss import cross_entropy_sum, reference
from gpt.machine.device import keep_memory

POSITIONS, WIDTH, VOCABULARY = 2048, 384, 50257


def chunked(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """torch's F.linear_cross_entropy, 512 positions at a time. With its default options it takes 22 s here."""
    options = LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None, acc_policy="accurate")
    return F.linear_cross_entropy(hidden, head, targets, reduction="sum", options=options)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gpt/loss.py": cross_entropy_sum,
    "all logits at once": lambda *arguments: reference(*arguments).sum(),
    "F.linear_cross_entropy, chunks of 512": chunked,
}


def seconds(way: Callable[..., Tensor], dtype: torch.dtype, hidden: Tensor, head: Tensor, targets: Tensor) -> float:
    hidden.grad = head.grad = None
    started = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = way(hidden, head, targets)
    loss.backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=10)
    turns = parser.parse_args().turns
    keep_memory()
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    head = (0.02 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    targets = torch.randint(VOCABULARY, (POSITIONS,))
    for dtype in (torch.bfloat16, torch.float32):
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for turn in range(turns + 1):
            for name, way in WAYS.items():
                taken = seconds(way, dtype, hidden, head, targets)
                if turn:  # the first one makes threads and kernels
                    times[name].append(taken)
        for name, taken in times.items():
            ratios = [one / ours for one, ours in zip(taken, times["gpt/loss.py"], strict=True)]
            print(
                f"{dtype}  {name:40} {statistics.median(taken) * 1000:6.0f} ms ({min(taken) * 1000:.0f} to "
                f"{max(taken) * 1000:.0f}), {statistics.median(ratios):.2f} x"
            )


if __name__ == "__main__":
    main()
