"""What a model is asked while it trains: the prompts of its data set, and held-out questions with their answers."""

import itertools
import json
from pathlib import Path

from gpt.config.data import DataConfig
from gpt.prompts import Question


def questions(cfg: DataConfig, n_references: int, prepared: Path) -> list[Question]:
    """The prompts of `cfg`, then the first `n_references` records of the validation split, which is in random order."""
    asked = [Question(prompt) for prompt in cfg.prompts]
    if n_references:
        with open(prepared / "val.jsonl", encoding="utf-8") as file:
            records = [json.loads(line) for line in itertools.islice(file, n_references)]
        asked += [Question(record["instruction"], record["input"], record["output"]) for record in records]
    return asked
