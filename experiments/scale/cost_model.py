"""Predicts how fast many GPUs train a model together, from what they compute and what they exchange.

    python experiments/scale/cost_model.py [--models small xl] [--gpus 8 64 512] [--tokens 32768] [--utilisation 0.36]

Operations and parameters are those that the project counts on the model itself; the rest is arithmetic on the constants
below, each with its source. Nothing is measured here. The README beside this file says what the tables show.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from gpt.config import launch
from gpt.machine import cost
from gpt.machine.machine import Machine
from gpt.machine.process_group import BUCKET
from gpt.machine.sizes import NotDrawn, build

VOCABULARY = 50257  # GPT-2's
WAYS = ("ddp", "fsdp")
LOW, EXACT = 2, 4  # bytes of a number in bfloat16 and in float32
FIXED_STEP = 524_288  # tokens of a step in all, as in llm.c's scripts/run_gpt2_124M.sh


@dataclass(frozen=True)
class Cluster:
    """Machines of several GPUs each. Bandwidths are bytes per second and GPU, one way; hops are seconds."""

    peak: float = 989e12  # operations per second in bfloat16, dense: NVIDIA's data sheet of the H100 SXM
    utilisation: float = 0.36  # torchtitan, benchmarks/llama3_h100_202412: 0.33 plain, 0.39 compiled (8B on 8 H100)
    memory: float = 2.7e12  # bytes per second: assumed, 0.8 of the data sheet's 3.35e12
    in_machine: int = 8
    nvlink: float = 370e9  # NCCL in a ring, of a line rate of 450e9: NVIDIA/nccl-tests issue 212
    infiniband: float = 46e9  # one port of 400 Gbit/s for each GPU, "46 to 48": NVIDIA/nccl-tests issue 290
    nvlink_hop: float = 3.4e-6  # newer NCCL's src/graph/tuning.cc: a ring, protocol "simple"
    infiniband_hop: float = 14e-6  # the same place, network
    tcp_hop: float = 30e-6  # gloo between two processes: assumed

    def machines(self, gpus: int) -> int:
        return -(-gpus // self.in_machine)

    def gather(self, content: float, gpus: int, calls: int = 1) -> float:
        """Seconds of all-gathers, or of reduce-scatters, of so many bytes in all: inside machines and between them, one
        after the other. NCCL does these in rings."""
        inside, machines = min(gpus, self.in_machine), self.machines(gpus)
        by_nvlink = (inside - 1) / inside * content / self.nvlink
        by_infiniband = (machines - 1) / machines * content / inside / self.infiniband
        hops = (inside - 1) * self.nvlink_hop + (machines - 1) * self.infiniband_hop
        return by_nvlink + by_infiniband + calls * hops

    def all_reduce(self, content: float, gpus: int, calls: int = 1) -> float:
        """The same of all-reduces: 2 (n - 1) / n of the bytes on each level. Between machines NCCL takes a tree, which
        needs fewer hops."""
        inside, machines = min(gpus, self.in_machine), self.machines(gpus)
        by_nvlink = 2 * (inside - 1) / inside * content / self.nvlink
        by_infiniband = 2 * (machines - 1) / machines * content / inside / self.infiniband
        hops = 2 * (inside - 1) * self.nvlink_hop + 2 * math.ceil(math.log2(machines)) * self.infiniband_hop
        return by_nvlink + by_infiniband + calls * hops

    def agreement(self, gpus: int) -> float:
        """Seconds in which all ranks tell each other a number: a ring of messages, see gloo's gloo/allgather.cc."""
        return (gpus - 1) * self.tcp_hop


@dataclass(frozen=True)
class Model:
    """What a model computes and what of it is exchanged; counts of numbers, not bytes."""

    name: str
    operations: float  # for a token, forward and backward
    parameters: int
    low: int  # of the parameters, those that FSDP gathers in bfloat16: linear layers of blocks
    blocks: int

    @classmethod
    def ask(cls, name: str) -> "Model":
        """Of one of conf/model/, asked of the model that would be trained."""
        cfg = launch.compose([f"model={name}", "data=text", "data.path=any.txt"])
        machine = Machine(torch.device("cpu"), torch.float32, {"micro_batch": 1})  # operations are the same on each
        with torch.device("meta"), NotDrawn():
            model = build(cfg.model, cfg.finetune, VOCABULARY)
        layers = [layer for block in model.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
        return cls(
            name,
            cost.count_operations(cfg, VOCABULARY, machine).total,
            model.n_parameters(),
            sum(weight.numel() for layer in layers for weight in layer.parameters()),
            len(model.blocks),
        )


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step on each of some GPUs."""

    compute: float
    memory: float  # optimizer, and copies into the buckets of an exchange
    exchange: float
    agreement: float
    hidden: float  # part of `exchange` that could go on while there is something to compute

    @property
    def plain(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.memory + self.exchange + self.agreement

    @property
    def overlapped(self) -> float:
        return self.plain - self.hidden


def step(model: Model, way: str, gpus: int, tokens: int, micro_batch: int, cluster: Cluster) -> Step:
    """A step in which each GPU computes so many tokens; `way` is ddp or fsdp."""
    compute = tokens * model.operations / (cluster.peak * cluster.utilisation)
    optimizer = cost.OPTIMIZER_BYTES * model.parameters / cluster.memory
    gradients = EXACT * model.parameters
    if gpus == 1:
        return Step(compute, optimizer, 0.0, 0.0, 0.0)
    if way == "ddp":  # gpt/machine/process_group.py: after the last micro-batch, in buckets
        exchange = cluster.all_reduce(gradients, gpus, math.ceil(gradients / BUCKET))
        copies = 4 * gradients / cluster.memory  # read and written, into the buckets and back
        return Step(
            compute,
            optimizer + copies,
            exchange,
            cluster.agreement(gpus),
            min(exchange, backward(compute, tokens, micro_batch)),
        )
    # gpt/machine/sharding.py: a block for forward and again for backward; embeddings and the rest once
    exact = EXACT * (model.parameters - model.low)
    gathers = cluster.gather(2 * LOW * model.low + exact, gpus, 2 * model.blocks + 2) * math.ceil(tokens / micro_batch)
    exchange = gathers + cluster.gather(gradients, gpus, model.blocks + 2)
    return Step(compute, optimizer / gpus, exchange, 2 * cluster.agreement(gpus), min(exchange, compute))


def backward(compute: float, tokens: int, micro_batch: int) -> float:
    """Seconds of the last micro-batch's backward pass, behind which gradients could be exchanged: two thirds of it."""
    return 2 / 3 * compute * min(1, micro_batch / tokens)


def efficiency(
    model: Model, way: str, gpus: int, tokens: int, micro_batch: int, cluster: Cluster
) -> tuple[float, float]:
    """Of a GPU among others, against one alone with as many tokens a step: nothing overlaps, all that can."""
    alone = step(model, way, 1, tokens, micro_batch, cluster).plain
    here = step(model, way, gpus, tokens, micro_batch, cluster)
    return alone / here.plain, alone / here.overlapped


def table(names: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps_table(models: list[Model], gpus: list[int], tokens: int, micro_batch: int, cluster: Cluster) -> str:
    rows = []
    for model, way, n in itertools.product(models, WAYS, gpus):
        s = step(model, way, n, tokens, micro_batch, cluster)
        parts = (s.compute, s.memory, s.exchange, s.agreement, s.plain)
        found = efficiency(model, way, n, tokens, micro_batch, cluster)
        rows.append([f"{model.name}, {way}", str(n), *(f"{1000 * part:,.1f}" for part in parts)])
        rows[-1] += [f"{n * tokens / s.plain / 1e6:,.2f} M", *(f"{one:.2f}" for one in found)]
    times = ["compute", "optimizer, copies", "exchange", "agreement", "step, ms"]
    return table(["model", "GPUs", *times, "tokens/s", "efficiency", "with all overlap"], rows)


def sensitivity_table(models: list[Model], gpus: list[int], tokens: int, micro_batch: int, cluster: Cluster) -> str:
    """Efficiencies, nothing overlapped, at each number of GPUs, if one assumption is changed."""
    bandwidths = {name: getattr(cluster, name) / 2 for name in ("nvlink", "infiniband")}
    hops = {name: getattr(cluster, name) * 2 for name in ("nvlink_hop", "infiniband_hop", "tcp_hop")}
    cases: dict[str, tuple[Cluster, Callable[[int], int]]] = {
        "as above": (cluster, lambda n: tokens),
        "bandwidths halved": (replace(cluster, **bandwidths), lambda n: tokens),
        "hops twice as long": (replace(cluster, **hops), lambda n: tokens),
        "utilisation 0.50": (replace(cluster, utilisation=0.5), lambda n: tokens),
        "a quarter of the tokens": (cluster, lambda n: tokens // 4),
        f"{FIXED_STEP:,} tokens a step in all": (cluster, lambda n: FIXED_STEP // n),
    }
    columns, rows = [(model, way) for model in models for way in WAYS], []
    for name, (changed, of_each) in cases.items():
        rows.append([name])
        for model, way in columns:
            found = (efficiency(model, way, n, of_each(n), micro_batch, changed)[0] for n in gpus)
            rows[-1].append(" / ".join(f"{one:.2f}" for one in found))
    return table(
        ["efficiency at " + " / ".join(map(str, gpus)), *(f"{model.name}, {way}" for model, way in columns)], rows
    )


def check_table(small: Model | None, cluster: Cluster) -> str:
    """The arithmetic against figures that others have published."""
    rows = []
    if small:  # llm.c, GPT-2 small on 8 H100, see modded-nanogpt's README: 10e9 tokens in 45 minutes
        here = step(small, "ddp", 8, FIXED_STEP // 8, FIXED_STEP // 8, cluster).plain
        minutes = 10e9 / FIXED_STEP * here / 60
        rows.append(
            ["GPT-2 small, 8 GPUs, 10 billion tokens, minutes", "45", f"{minutes:.1f}", f"{minutes / 45 - 1:+.0%}"]
        )
    # torchtitan, benchmarks/llama3_h100_202412: 8B, FSDP2, tokens/s of each GPU. Two rows of 8,192 tokens (the length
    # is that of its llama3_8b.toml); all weights in bfloat16, gradients in float32, 32 blocks and 2 other groups.
    parameters, tokens, on_8, on_128 = 8.03e9, 2 * 8192, 5762, 5605
    exchange = {
        n: cluster.gather(2 * LOW * parameters, n, 2 * 34) + cluster.gather(EXACT * parameters, n, 34) for n in (8, 128)
    }
    longer = tokens / on_8 + exchange[128] - exchange[8]
    for name, predicted in (("nothing overlaps", tokens / longer), ("all overlaps", on_8)):
        what = f"8B, FSDP2, 128 GPUs, tokens/s of each, from {on_8:,} on 8; {name}"
        rows.append([what, f"{on_128:,}", f"{predicted:,.0f}", f"{predicted / on_128 - 1:+.1%}"])
    return table(["what", "published", "here", "deviation"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small", "xl"], help="of conf/model/")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--tokens", type=int, default=32_768, help="of each GPU in a step")
    parser.add_argument("--micro-batch", type=int, default=16_384, help="tokens")
    parser.add_argument("--utilisation", type=float, default=Cluster.utilisation, help="share of the peak")
    parser.add_argument("--nvlink", type=float, default=Cluster.nvlink, help="bytes per second")
    parser.add_argument("--infiniband", type=float, default=Cluster.infiniband, help="bytes per second, of each GPU")
    args = parser.parse_args()
    cluster = Cluster(utilisation=args.utilisation, nvlink=args.nvlink, infiniband=args.infiniband)
    models = [Model.ask(name) for name in args.models]
    for model in models:
        print(f"{model.name}: {model.parameters:,} parameters, {model.operations / 1e9:.3f} GFLOP for a token")
    print(f"{args.tokens:,} tokens of each GPU in a step; times in ms\n")
    print(steps_table(models, args.gpus, args.tokens, args.micro_batch, cluster), end="\n\n")
    print(sensitivity_table(models, args.gpus, args.tokens, args.micro_batch, cluster), end="\n\n")
    print(check_table(next((model for model in models if model.name == "small"), None), cluster))


if __name__ == "__main__":
    main()
