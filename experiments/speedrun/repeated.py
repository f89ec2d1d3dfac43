"""Says how well models predict what has stood before in the same held-out record, and what is new in it.

    python experiments/speedrun/repeated.py outputs/runs/speedrun/baseline_1 outputs/runs/speedrun/modern_muon_1

A token counts as frequent, less frequent or rare by how often the held-out records have it: at least one in 1,000
tokens, one in 10,000, or fewer.
"""

import argparse
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpt.generation import quality  # noqa: E402
from gpt.notebook import load_model  # noqa: E402

LEAST = {"frequent": 1e-3, "less frequent": 1e-4, "rare": 0.0}
KINDS = ("new in the record", "was there, after another token", "pair was there")


def kinds_of(ids: list[int]) -> list[str]:
    """For each token but the first, one of KINDS."""
    seen, pairs, kinds = {ids[0]}, set(), []
    for before, token in pairwise(ids):
        kinds.append(KINDS[2] if (before, token) in pairs else KINDS[1] if token in seen else KINDS[0])
        seen.add(token)
        pairs.add((before, token))
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--records", type=int, default=300)
    arguments = parser.parse_args()
    models = [load_model(run) for run in arguments.runs]
    found = quality.held_out(models[0])
    if found is None:
        sys.exit(f"{arguments.runs[0]}: the data of this run is not there any more")
    split, *_ = found
    shares = np.bincount(split.ids) / len(split.ids)
    losses: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[] for _ in arguments.runs])
    for number, model in enumerate(loaded.model for loaded in models):
        for start, _, end in split.documents[: arguments.records]:
            ids = split.ids[start : min(end, start + model.config.context_length)].tolist()
            with torch.inference_mode():
                logits = model(torch.tensor([ids[:-1]]))[0]
            own = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
            for kind, token, loss in zip(kinds_of(ids), ids[1:], own, strict=True):
                name = next(name for name, least in LEAST.items() if shares[token] >= least)
                losses[kind, name][number].append(loss)
    total = sum(len(each[0]) for each in losses.values())
    print("| | | share | " + " | ".join(run.name for run in arguments.runs) + " |")
    print("|---|---|---:|" + "---:|" * len(arguments.runs))
    for kind in KINDS:
        for name in LEAST:
            each = losses[kind, name]
            means = " | ".join(f"{np.mean(own):.2f}" for own in each)
            print(f"| {kind} | {name} | {len(each[0]) / total:.3f} | {means} |")


if __name__ == "__main__":
    main()
