"""Tries many settings at once in few runs of a small model, and prints the effect of each on the validation loss.

    python experiments/speedrun/screen.py outputs/runs/screen

Sixteen runs for at most eight settings, thirty-two for sixteen, each with half of them, chosen so that the effect of no
setting is mixed up with that of another one or with that of any two together (a fractional factorial design of
resolution IV: Box, Hunter and Hunter, "Statistics for Experimenters", chapter 6). What pairs do together is the measure
of noise. A second call goes on where one has ended.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
TRACK = "experiments=speedrun/screen"


def sign(run: int, word: int) -> int:
    """Whether a run has a setting (1) or not (-1)."""
    return 1 if (run & word).bit_count() % 2 else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_name("settings.json"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("typed", nargs="*", help="what else train.py gets")
    arguments = parser.parse_args()
    settings: dict[str, list[str]] = json.loads(arguments.settings.read_text())
    n_runs = 2 ** math.ceil(math.log2(2 * len(settings)))
    words = range(1, n_runs)
    columns = dict(zip(settings, [word for word in words if word.bit_count() % 2], strict=False))
    pairs = [word for word in words if word.bit_count() % 2 == 0]  # columns of sums of effects of pairs
    losses = []
    for run in range(n_runs):
        with_them = [name for name, word in columns.items() if sign(run, word) > 0]
        overrides = [value for name in with_them for value in settings[name]]
        of_seeds = []
        for seed in range(1, arguments.seeds + 1):
            folder = arguments.folder / f"{run:02}_{seed}"
            command = [sys.executable, "train.py", TRACK, *overrides, *arguments.typed, f"seed={seed}"]
            command += [f"out_dir={folder.absolute()}", "wandb.mode=disabled"]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            of_seeds.append([row["val/loss"] for row in rows if "val/loss" in row][-1])
        losses.append(sum(of_seeds) / len(of_seeds))
        print(f"{run:2}  {losses[-1]:.4f}  {' '.join(with_them)}", flush=True)

    def effect(word: int) -> float:
        return sum(sign(run, word) * loss for run, loss in enumerate(losses)) / (len(losses) / 2)

    noise = math.sqrt(sum(effect(word) ** 2 for word in pairs) / len(pairs))
    half = noise * stats.t.ppf(0.975, len(pairs))
    print("\n| setting | effect on val/loss | 95 % interval |\n|---|---:|---|")
    for name in sorted(columns, key=lambda name: effect(columns[name])):
        value = effect(columns[name])
        print(f"| {name}: `{' '.join(settings[name])}` | {value:+.4f} | {value - half:+.4f} to {value + half:+.4f} |")


if __name__ == "__main__":
    main()
