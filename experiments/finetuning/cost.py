"""What fine-tuning costs: memory and time of a step of GPT-2 small, all of it trained or a part.

    python experiments/finetuning/cost.py [--turns 3] [--context 256] [--rows 4] [--dropout 0.0]

Each measurement is a process of its own, turn by turn: the peak of its memory, Python and torch included, and the
median of its steps. Weights and tokens are random; what is in them changes neither.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt import finetune, loop, optim
from gpt.config import launch
from gpt.data.batching import Batch
from gpt.machine import device, free_memory
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN

METHODS = {
    "full": ["finetune=full"],
    "lora, rank 16, c_attn": ["finetune=lora"],
    "lora, rank 16, all linear": [
        "finetune=lora", "finetune.targets=[attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj]",
    ],
    "last 2 blocks": ["finetune=last_blocks"],
}  # fmt: skip


def measure(method: str, context: int, rows: int, dropout: float, steps: int) -> None:
    """In a process of its own: prints trained parameters, peak memory in bytes and seconds of a step."""
    cfg = launch.compose(["model=small", *METHODS[method]])
    device.keep_memory()
    shape = dataclasses.replace(cfg.model, context_length=context, dropout=dropout)
    model = GPT(shape, 50257).train()
    finetune.prepare(model, cfg.finetune, seed=0)
    optimizer = optim.build(model, cfg.optimizer, cfg.finetune)
    seconds = []
    for _ in range(steps):
        tokens = torch.randint(50257, (rows, context + 1))
        batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None, rows * context, rows * context)
        started = time.perf_counter()
        loop.train_step(model, optimizer, NEXT_TOKEN, [batch], Machine(torch.device("cpu")), grad_clip=1.0)
        seconds.append(time.perf_counter() - started)
    print(finetune.n_trained(model), free_memory.peak(), statistics.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.context, args.rows, args.dropout, args.steps)
    found: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for _ in range(args.turns):
        for method in METHODS:
            command = [sys.executable, *sys.argv, "--measure", method]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[method].append([float(number) for number in output.split()])
    print(
        f"GPT-2 small, {args.rows} x {args.context} tokens, dropout {args.dropout}, {torch.get_num_threads()} threads"
    )
    print(f"{'':26}{'trained':>13}{'GB':>8}{'of full':>9}{'s a step':>10}{'of full':>9}")
    full_gb, full_seconds = (statistics.median(run[i] for run in found["full"]) for i in (1, 2))
    for method, runs in found.items():
        peak, seconds = (statistics.median(run[i] for run in runs) for i in (1, 2))
        ratios = f"{peak / full_gb:>9.2f}{seconds:>10.2f}{seconds / full_seconds:>9.2f}"
        print(f"{method:26}{int(runs[0][0]):>13,}{peak / 1e9:>8.2f}{ratios}")


if __name__ == "__main__":
    main()
