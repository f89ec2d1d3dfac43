"""How fast answers are generated in batches, against one at a time, and which answers differ then.

    python experiments/answers/throughput.py outputs/runs/answers_base_1 [--questions 64] [--turns 3] [--new 128]

The questions are the first ones of MedQuAD's test split, those of like length together, as evaluate=answers has them.
Every turn runs each number of rows once, in this order. No answer ends early, so that all sizes compute as many tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt import tokenizer
from gpt.files.paths import PROJECT_ROOT
from gpt.generation import continuation
from gpt.notebook import load_model
from gpt.prompts import format_prompt
from gpt.sampling import Draws

ROWS = (1, 4, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new", type=int, default=128)
    given = parser.parse_args()
    loaded = load_model(given.checkpoint)
    tokens = tokenizer.load(loaded.tokenizer_name)
    with open(PROJECT_ROOT / "outputs/data/medquad/test.jsonl", encoding="utf-8") as file:
        asked = [json.loads(line)["instruction"] for _, line in zip(range(given.questions), file, strict=False)]
    prompts = sorted((tokens.encode(format_prompt("alpaca", text)) for text in asked), key=len)
    draws = Draws(given.new, eos=None, temperature=0.0, top_k=None, top_p=None)  # no answer ends by itself
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    answers: dict[int, list[list[int]]] = {}
    for _ in range(given.turns):
        for rows in ROWS:
            started = time.perf_counter()
            answers[rows] = [
                new.ids
                for i in range(0, len(prompts), rows)
                for new in continuation.continue_all(
                    loaded.model, prompts[i : i + rows], draws, [torch.Generator()] * len(prompts[i : i + rows])
                )
            ]
            seconds[rows].append(time.perf_counter() - started)
    n_tokens = sum(map(len, answers[1]))
    print(f"{len(prompts)} questions, {n_tokens:,} tokens; {torch.get_num_threads()} threads, float32")
    for rows in ROWS:
        ratios = [one / own for one, own in zip(seconds[1], seconds[rows], strict=True)]
        same = sum(a == b for a, b in zip(answers[1], answers[rows], strict=True))
        equal = sum(a == b for x, y in zip(answers[1], answers[rows], strict=True) for a, b in zip(x, y, strict=True))
        print(f"{rows:3} rows: {n_tokens / statistics.median(seconds[rows]):7,.0f} tokens/s, "
              f"{statistics.median(ratios):.2f} x one at a time ({min(ratios):.2f}-{max(ratios):.2f}); "
              f"{same} answers and {equal / n_tokens:.2%} of the tokens are the same")  # fmt: skip


if __name__ == "__main__":
    main()
