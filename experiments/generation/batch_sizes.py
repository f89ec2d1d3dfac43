"""How often a token differs between numbers of texts that are computed together.

    python experiments/generation/batch_sizes.py outputs/runs/mini [--questions 64] [--new 128] [--threads 2]

The questions are the first ones of MedQuAD's test split. A text that differs in one token is another one from there on,
so what is counted is first differences: tokens up to and with the first other one, of which it is one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt import sampling, tokenizer
from gpt.files.paths import PROJECT_ROOT
from gpt.generation.continuation import Row, continue_each
from gpt.notebook import load_model
from gpt.prompts import format_prompt
from gpt.sampling import Draws

SLOTS = (8, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_model(given.checkpoint)
    tokens = tokenizer.load(loaded.tokenizer_name)
    with open(PROJECT_ROOT / "outputs/data/medquad/test.jsonl", encoding="utf-8") as file:
        asked = [json.loads(line)["instruction"] for _, line in zip(range(given.questions), file, strict=False)]
    prompts = [tokens.encode(format_prompt(loaded.template or "alpaca", text)) for text in asked]
    new = min(given.new, loaded.model.config.context_length - max(map(len, prompts)))
    for name, draws in (
        ("greedy", Draws(new, None, 0.0, None, None)),
        ("temperature 0.8, top_k 50", Draws(new, None, 0.8, 50, None)),
        ("temperature 1", Draws(new, None, 1.0, None, None)),
    ):
        alone = [sampling.generate(loaded.model, prompt, draws, num_samples=1, seed=1337) for prompt in prompts]
        texts = {1: [ids for [ids] in alone]}
        for n_slots in SLOTS:
            rows = [Row(prompt, new, sampling.sample_generator(1337, 0)) for prompt in prompts]
            for _ in continue_each(loaded.model, rows, n_slots, draws, n_columns=max(map(len, prompts)) + new):
                pass
            texts[n_slots] = [row.new for row in rows]
        for one, other in ((1, 8), (1, 32), (1, 64), (8, 32), (8, 64)):
            compared, different = first_differences(texts[one], texts[other])
            rate = f"one token in {compared / different:,.0f}" if different else "no token"
            print(f"{name}: {one} and {other} at once: {rate} differs; {different} of {len(prompts)} texts of {new} "
                  f"tokens, {compared:,} tokens compared", flush=True)  # fmt: skip


def first_differences(ones: list[list[int]], others: list[list[int]]) -> tuple[int, int]:
    """Tokens up to the first that differs, over all texts, and how many texts have one."""
    compared = different = 0
    for one, other in zip(ones, others, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        compared += len(one) if same is None else same + 1
        different += same is not None
    return compared, different


if __name__ == "__main__":
    main()
