"""Training throughput beside transformers' GPT2LMHeadModel: `python experiments/speed/bench.py [--help]`.

Both models take the same full steps (forward, backward, clip, AdamW) on the same rows without padding, in one process,
one after the other in turns, so that a machine that slows down slows both. Appends to results.csv beside this file.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from gpt.data import Batch  # noqa: E402
from gpt.device import choose_device, choose_dtype, keep_memory  # noqa: E402
from gpt.loop import memory_gb, train_step  # noqa: E402
from gpt.model import GPT  # noqa: E402
from gpt.optim import build  # noqa: E402
from gpt.schema import AdamWConfig, ModelConfig  # noqa: E402

SHAPES = {"tiny": (4, 4, 128), "mini": (6, 6, 384), "small": (12, 12, 768)}  # layers, heads, width
VOCABULARY = 50257


def ours(args, device, dtype):
    """One optimizer step of this project, as train.py takes it."""
    n_layer, n_head, n_embd = SHAPES[args.model]
    model = GPT(ModelConfig(args.model, n_layer, n_head, n_embd, args.context, args.dropout, True), VOCABULARY)
    model.to(device).train()
    optimizer = build(model, AdamWConfig("adamw", 1e-4, 0.1, 0.9, 0.95, 1e-8))
    return lambda rows: train_step(
        model, optimizer, [Batch(rows[:, :-1], rows[:, 1:], None, None, rows[:, 1:].numel(), rows[:, 1:].numel())],
        device, dtype, grad_clip=1.0,
    )  # fmt: skip


def transformers_eager(args, device, dtype):
    """The same step on transformers' GPT-2: its logits, torch's cross-entropy and AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd = SHAPES[args.model]
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args.dropout)
    shape = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=args.context, **pdrop)
    model = GPT2LMHeadModel(shape).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def step(rows):
        rows = rows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="mini")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--steps", type=int, default=2, help="steps in each turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--keep-memory", action="store_true", help="the allocator setting that train.py makes")
    args = parser.parse_args()
    if args.keep_memory and not keep_memory():
        sys.exit("the allocator cannot be told to keep memory here")
    device = choose_device("auto")
    dtype = choose_dtype(args.dtype, device)
    steps = {"this project": ours(args, device, dtype), "transformers": transformers_eager(args, device, dtype)}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY, (args.rows, args.context + 1), generator=generator)
    tokens = args.rows * args.context * args.steps
    rates = {name: [] for name in steps}
    for step in steps.values():
        step(rows)
    for _ in range(args.turns):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(args.steps):
                step(rows)
            rates[name].append(tokens / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    where = f"{device}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{args.model}, {args.rows} x {args.context}, {dtype}, {where}, torch {torch.__version__}")
    table = []
    for name, values in rates.items():
        table.append([name, args.model, args.rows, args.context, str(dtype), args.keep_memory, where, *spread(values)])
        print(f"{name:>14}: {statistics.median(values):8.0f} tokens/s  ({min(values):.0f} to {max(values):.0f})")
    print(f"ratio in each turn: median {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"peak memory of the process, both models: {memory_gb(device):.2f} GB")
    results = HERE / "results.csv"
    is_new = not results.exists()
    with open(results, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            shape = ["who", "model", "rows", "context", "dtype", "keep_memory", "where"]
            writer.writerow([*shape, "tokens_per_second_median", "min", "max"])
        writer.writerows(table)


def spread(values: list[float]) -> list[float]:
    return [round(x) for x in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()
