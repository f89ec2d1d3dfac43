"""Writes the answers of MedQuAD's training split as running text: `python experiments/answers/running_text.py`.

They are those of the training split alone: what is scored must not be in a text that a model has read.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt.data.text_files import END_OF_TEXT
from gpt.files.paths import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "outputs" / "data" / "medquad"  # of python prepare_data.py data=medquad


def main() -> None:
    with open(FOLDER / "train.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line)["output"] for line in file]
    path = FOLDER.with_name("answers.txt")
    path.write_text(END_OF_TEXT.join(answers), encoding="utf-8")
    print(f"{len(answers):,} answers, {len(set(answers)):,} different ones: {path}")


if __name__ == "__main__":
    main()
