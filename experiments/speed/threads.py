"""Measures how long threads should spin: `python experiments/speed/threads.py --help`.

For each value of GOMP_SPINCOUNT, in turns, a run of the default model on a quiet machine and one beside another busy
process: tokens/s of each, medians, the least and the most. The values of one turn are measured one after the other,
because a machine's speed changes with the hour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUSY = "while True: pass"


def speed(spin: int, steps: int, n_busy: int) -> float:
    """Tokens/s of a run, the first quarter of its steps left out, beside `n_busy` other processes."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "train.py", f"train.max_steps={steps}", "train.log_every=10", "train.eval_every=10000",
                 "train.sample_every=null", "train.save_every=10000", "wandb.mode=disabled", f"out_dir={folder}/run"],
                cwd=ROOT, env=os.environ | {"GOMP_SPINCOUNT": str(spin)}, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    finally:
        for other in others:
            other.kill()
            other.wait()
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return statistics.median(speeds[len(speeds) // 4 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", type=int, nargs="+", default=[0, 1_000, 10_000, 30_000, 100_000, 300_000])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="numbers of other busy processes")
    arguments = parser.parse_args()
    speeds: dict[tuple[int, int], list[float]] = {}
    for _ in range(arguments.turns):
        for n_busy in arguments.busy:
            for spin in arguments.spins:
                speeds.setdefault((n_busy, spin), []).append(speed(spin, arguments.steps, n_busy))
    print("| other processes | GOMP_SPINCOUNT | tokens/s | least | most |\n|---:|---:|---:|---:|---:|")
    for (n_busy, spin), each in speeds.items():
        print(f"| {n_busy} | {spin:,} | {statistics.median(each):,.0f} | {min(each):,.0f} | {max(each):,.0f} |")


if __name__ == "__main__":
    main()
