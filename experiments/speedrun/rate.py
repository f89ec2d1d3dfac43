"""Measures the tokens per second of records, turn by turn, so that a slow minute of the machine meets all of them.

    python experiments/speedrun/rate.py baseline candidate --turns 5

Prints for each the median over turns of the median step, and by how much it is faster than the first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = 4  # steps that are not counted: threads, kernels and buffers are made in them


def rate(record: str, tokens: int, typed: list[str]) -> float:
    """Tokens per second of a run's steps, evaluations apart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"experiments=speedrun/{record}", *typed, "wandb.mode=disabled"]
        command += [f"train.max_tokens={tokens}", "train.eval_tokens=1024", "train.log_every=1"]
        subprocess.run([*command, f"out_dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    return statistics.median(rates[FIRST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", help="names of files in experiments/speedrun/")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=30_720)
    parser.add_argument("--typed", nargs="*", default=[], help="what else train.py gets")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {record: [] for record in arguments.records}
    for _ in range(arguments.turns):
        for record, found in rates.items():
            found.append(rate(record, arguments.tokens, arguments.typed))
    first = statistics.median(rates[arguments.records[0]])
    for record, found in rates.items():
        median = statistics.median(found)
        print(f"{record}: {median:,.0f} tokens/s ({min(found):,.0f} to {max(found):,.0f}), {median / first:.2f}")


if __name__ == "__main__":
    main()
