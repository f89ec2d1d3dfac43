"""What a model is asked while it trains."""

import json

from conftest import data_config

from gpt.prompts import Question
from gpt.references import questions


def test_held_out_questions_come_with_their_answers_after_the_prompts_of_the_data(tmp_path):
    records = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(3)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = data_config(prompts=["What is Croup ?"])
    assert questions(cfg, 2, tmp_path) == [
        Question("What is Croup ?"),
        Question("q0", "", "a0"),
        Question("q1", "", "a1"),
    ]
    assert len(questions(cfg, 9, tmp_path)) == 4


def test_without_references_no_file_is_needed(tmp_path):
    assert questions(data_config(prompts=["a", "b"]), 0, tmp_path) == [Question("a"), Question("b")]
