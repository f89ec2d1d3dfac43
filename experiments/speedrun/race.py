"""Prints how many tokens each run has read until its validation loss was at the target, and which record is accepted.

    python experiments/speedrun/race.py --target 3.85 outputs/runs/speedrun/*

Folders are named <record>_<seed>; the first record is the one that the others are compared with.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from scipy import stats

MIN_SEEDS = 3
LEVEL = 0.01  # of the one-sided Welch test, on logarithms, that accepts a record


def tokens_to(folder: Path, target: float) -> float:
    """Tokens that had been read at the first evaluation at or below the target; infinity when there was none."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next((row["tokens"] for row in rows if row.get("val/loss", math.inf) <= target), math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    records: dict[str, list[float]] = defaultdict(list)
    for folder in arguments.folders:
        records[folder.name.rpartition("_")[0]].append(tokens_to(folder, arguments.target))
    first, *_ = records.values()
    print(f"| record | tokens to {arguments.target:g}, each seed | share of the first | 95 % interval | p | accepted |")
    print("|---|---|---:|---|---:|---|")
    for name, tokens in records.items():
        each = ", ".join(f"{n:,.0f}" if math.isfinite(n) else "never" for n in tokens)
        share = interval = p = accepted = ""
        if tokens is not first and all(map(math.isfinite, [*tokens, *first])):
            difference = statistics.mean(map(math.log, tokens)) - statistics.mean(map(math.log, first))
            share = f"{math.exp(difference):.3f}"
            if min(len(tokens), len(first)) >= MIN_SEEDS:
                test = stats.ttest_ind(
                    *([math.log(n) for n in group] for group in (tokens, first)), equal_var=False, alternative="less"
                )
                both = stats.ttest_ind(*([math.log(n) for n in group] for group in (tokens, first)), equal_var=False)
                low, high = map(math.exp, both.confidence_interval())
                interval, p = f"{low:.3f} to {high:.3f}", f"{test.pvalue:.4f}"
                accepted = "yes" if test.pvalue < LEVEL else "no"
        print(f"| {name} | {each} | {share} | {interval} | {p} | {accepted} |")


if __name__ == "__main__":
    main()
