"""Training throughput beside others, as a share of what the machine can do: `python experiments/speed/bench.py --help`.

Everybody takes full optimizer steps (forward, backward, clip, AdamW) of the same shapes, in a process of its own, one
after the other in turns, so that a machine that slows down slows all; before each turn the machine itself is measured.
Ratios and shares are those within a turn. Peers that are not installed are named and left out:

    pip install transformers litgpt

Writes results.csv and a figure beside this file, or under --out.
"""

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import machine  # noqa: E402
import torch  # noqa: E402
from contestants import VOCABULARY, medquad  # noqa: E402

from gpt.config.families import GPT2Config  # noqa: E402
from gpt.data import preparation  # noqa: E402
from gpt.machine.cost import count_operations  # noqa: E402
from gpt.machine.device import choose_device, choose_dtype  # noqa: E402
from gpt.machine.machine import Machine  # noqa: E402

SHAPES = {"tiny": (4, 4, 128), "mini": (6, 6, 384), "small": (12, 12, 768)}  # layers, heads, width


class Contestant:
    """A process of contestants.py, ready to take steps."""

    def __init__(self, who: str, job: dict, dtype: str, compiled: bool) -> None:
        self.label = f"{who.replace('_', ' ')}, {dtype}{', compiled' if compiled else ''}"
        if who == "book":
            self.label = f"the book's way, {dtype}"
        self.rates: list[float] = []
        command = [sys.executable, str(HERE / "contestants.py"), json.dumps(job | {
            "who": who, "dtype": dtype, "compile": compiled})]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = self.answer()
        self.start, self.first_step, self.memory_gb = ready["start"], ready["first_step"], 0.0

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label}: ended with {self.process.wait()}")
        return json.loads(line)

    def turn(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.rates.append(answer["tokens"] / answer["seconds"])
        self.memory_gb = answer["memory_gb"]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def contestants(args: argparse.Namespace, job: dict, native_bfloat16: bool) -> list[Contestant]:
    """This project as train.py runs it comes first; then its other ways, then the others."""
    dtypes = ["bfloat16", "float32"] if native_bfloat16 else ["float32"]
    found = []
    for who in ["this_project", *(["book"] if job["data"] else ["transformers", "litgpt"])]:
        if who in ("transformers", "litgpt") and find_spec(who) is None:
            print(f"{who} is not installed: left out")
            continue
        for dtype in dtypes if who != "book" else ["float32"]:
            for compiled in [False, True] if args.compiled and who != "book" else [False]:
                found.append(Contestant(who, job, dtype, compiled))
                print(
                    f"{found[-1].label}: ready after {found[-1].start:.1f} + {found[-1].first_step:.1f} s", flush=True
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="mini")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--medquad", metavar="CSV", help="instruction tuning on this file, against the book's way")
    parser.add_argument("--steps", type=int, default=2, help="steps in each turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="compiled models, too")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.csv and the figure")
    args = parser.parse_args()
    device = choose_device("auto")
    native_bfloat16 = choose_dtype("auto", device) == torch.bfloat16
    job = {"model": args.model, "shape": SHAPES[args.model], "rows": args.rows, "context": args.context,
           "dropout": args.dropout, "data": prepare(args.medquad) if args.medquad else None}  # fmt: skip
    model = GPT2Config("gpt2", args.model, *SHAPES[args.model], args.context, args.dropout, True, "tanh")
    train = SimpleNamespace(gradient_checkpointing=False, rows_per_step=lambda context_length: args.rows)
    cfg = SimpleNamespace(model=model, finetune=None, train=train, data=SimpleNamespace(kind="text"))
    operations = count_operations(cfg, VOCABULARY, Machine(device, torch.float32, {"micro_batch": args.rows})).total
    work = "MedQuAD, instruction tuning" if args.medquad else "pretraining"
    where = f"{device}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{work}: {args.model}, {args.rows} x {args.context} tokens; {where}, torch {torch.__version__}")
    entrants = contestants(args, job, native_bfloat16)
    ceilings = {name: [] for name in machine.NAMES}
    for _ in range(args.turns):
        for name, rates in ceilings.items():
            rates.append(machine.product_rate(getattr(torch, name), device))
        for entrant in entrants:
            entrant.turn(args.steps)
    for entrant in entrants:
        entrant.end()
    for name, rates in ceilings.items():
        print(f"{machine.NAMES[name]}: {spread([rate / 1e9 for rate in rates], 'GFLOP/s')}")
    print(f"memory read: {machine.read_rate(device, machine.READ) / 1e9:.1f} GB/s")
    ceiling = ceilings["bfloat16" if native_bfloat16 else "float32"]
    table = [row(entrant, entrants[0], operations, ceiling) for entrant in entrants]
    show(table)
    facts = {"work": work, "model": args.model, "rows": args.rows, "context": args.context, "where": where,
             "platform": platform.machine(), "torch": torch.__version__}  # fmt: skip
    write(args.out, [facts | values for values in table])
    draw(args.out / f"{'instruction' if args.medquad else args.model}.png", table, work, facts)


def prepare(path: str) -> str:
    """MedQuAD, prepared as data=medquad."""
    cfg = medquad(path=str(Path(path).resolve()), prepared_dir="outputs/data/medquad")
    return str(preparation.ensure(cfg, HERE.parents[1]).folder)


def row(entrant: Contestant, first: Contestant, operations: float, ceiling: list[float]) -> dict:
    """A line of the table: medians, and least and most where they differ from turn to turn."""
    shares = [rate * operations / most for rate, most in zip(entrant.rates, ceiling, strict=True)]
    ratios = [ours / theirs for ours, theirs in zip(first.rates, entrant.rates, strict=True)]
    steady = statistics.median(entrant.rates)
    return {
        "who": entrant.label,
        "tokens_per_second": round(steady), "least": round(min(entrant.rates)), "most": round(max(entrant.rates)),
        "share_of_ceiling": round(statistics.median(shares), 3),
        "first_is_faster_by": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2), "ratio_most": round(max(ratios), 2),
        "memory_gb": round(entrant.memory_gb, 2),
        "start_seconds": round(entrant.start, 1), "first_step_seconds": round(entrant.first_step, 1),
    }  # fmt: skip


def show(table: list[dict]) -> None:
    print(f"{'':<34} {'tokens/s':>20} {'of ceiling':>10} {'first / this':>19} {'GB':>6} {'start':>6} {'1st step':>8}")
    for r in table:
        rates = f"{r['tokens_per_second']} ({r['least']}-{r['most']})"
        ratios = f"{r['first_is_faster_by']:.2f} ({r['ratio_least']:.2f}-{r['ratio_most']:.2f})"
        print(
            f"{r['who']:<34} {rates:>20} {r['share_of_ceiling']:>10.2f} {ratios:>19} {r['memory_gb']:>6.2f} "
            f"{r['start_seconds']:>6.1f} {r['first_step_seconds']:>8.1f}"
        )


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.0f} {unit} ({min(values):.0f} to {max(values):.0f})"


def write(folder: Path, lines: list[dict]) -> None:
    """Replaces the lines of results.csv that are about the same work and shape on the same kind of machine."""
    path, key = folder / "results.csv", ("work", "model", "rows", "context", "where")
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            kept = [line for line in csv.DictReader(file) if any(line[k] != str(lines[0][k]) for k in key)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *lines])


def draw(path: Path, table: list[dict], work: str, facts: dict) -> None:
    """Medians as bars, from the least to the most as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.45 * len(table)), layout="constrained")
    medians = [r["tokens_per_second"] for r in table]
    whiskers = [
        [r["tokens_per_second"] - r["least"] for r in table],
        [r["most"] - r["tokens_per_second"] for r in table],
    ]
    colors = ["tab:blue" if r["who"].startswith("this project") else "tab:gray" for r in table]
    axes.barh([r["who"] for r in table], medians, xerr=whiskers, color=colors, capsize=3)
    for y, r in enumerate(table):
        label = f" {r['tokens_per_second']:,} = {100 * r['share_of_ceiling']:.0f} %"
        axes.text(0, y, label, va="center", color="white")
    axes.invert_yaxis()
    axes.set_xlabel("real tokens/s (share of the machine's fastest matrix products)")
    axes.set_title(
        f"{work}: {facts['model']}, {facts['rows']} x {facts['context']}, {facts['where']}", fontsize="medium"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
