"""Prints the study's table from the results of its evaluations: `python experiments/answers/table.py`."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt.evaluation import contamination
from gpt.files.paths import PROJECT_ROOT

OUTPUTS = PROJECT_ROOT / "outputs"
FOLDERS = {
    "base": sorted((OUTPUTS / "runs").glob("answers_base_*")),
    "full": sorted((OUTPUTS / "sweeps" / "answers_full").glob("*/")),
    "LoRA": sorted((OUTPUTS / "sweeps" / "answers_lora").glob("*/")),
}
FIGURES = {
    "answers": ["ROUGE-1", "ROUGE-2", "ROUGE-L", "F1", "chrF", "BLEU", "exact match", "length ratio", "stopped",
                "repetition", "copied span", "loss of the reference"],
    "choice": ["accuracy", "accuracy per byte", "bits per byte of the right one"],
    "loss": ["bits per byte", "perplexity of words"],
}  # fmt: skip
SPLIT = {"answers": ["ROUGE-L", "loss of the reference"], "choice": ["accuracy per byte"]}


def results(kind: str) -> dict[str, list[dict[str, Any]]]:
    """The results of each seed, by method."""
    found = {}
    for method, folders in FOLDERS.items():
        paths = [path for folder in folders for path in sorted(folder.glob(f"evaluations/{kind}_study_*.json"))]
        found[method] = [json.loads(path.read_text()) | {"path": path} for path in paths]
    return found


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    compared = {kind: json.loads((OUTPUTS / "evaluations/study" / f"{kind}.json").read_text()) for kind in FIGURES}
    baselines = ["BM25 baseline", "most frequent answer", "another's reference", "chance", "shortest answer"]
    names = list(compared["answers"]["figures"])  # as FOLDERS has them
    row("", *FOLDERS, *baselines)
    row(*["---"] * (1 + len(FOLDERS) + len(baselines)))
    for kind, figures in FIGURES.items():
        own = results(kind)
        for name in figures:
            cells = []
            for entry in names:
                figure = compared[kind]["figures"][entry][name]
                cells.append(f"{figure['value']:.3g} [{figure['low']:.3g}, {figure['high']:.3g}]")
            fixed = own["base"][0]["figures"]
            cells += [f"{fixed[b][name]['value']:.3g}" if name in fixed.get(b, {}) else "" for b in baselines]
            row(f"{kind}: {name}", *cells)
    print()
    for kind, figures in SPLIT.items():
        own = results(kind)
        for name in figures:
            for part in (contamination.SHARED, contamination.UNSHARED):
                means = [statistics.fmean(one["figures"][part][name]["value"] for one in own[m]) for m in FOLDERS]
                row(f"{name}, {part.partition(', ')[2]}", *(f"{mean:.3g}" for mean in means))
    lines = results("answers")["base"][0]["path"].with_suffix(".jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for is_shared in (True, False):
        own = [one for one in rows if (one["shared span"] >= contamination.CONTAMINATED) == is_shared]
        rouge = statistics.fmean(one["systems"]["BM25 baseline"]["ROUGE-L"] for one in own)
        print(f"BM25's ROUGE-L on {len(own)} {'shared' if is_shared else 'other'} questions: {rouge:.3g}")


if __name__ == "__main__":
    main()
