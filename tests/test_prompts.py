"""The text around an instruction, token by token."""

import json

import pytest
from conftest import data_config

from gpt import tokenizer
from gpt.prompts import (
    ALPACA_HEADER,
    TEMPLATES,
    Question,
    end_of_response,
    format_prompt,
    format_turn,
    questions,
)


def test_the_alpaca_prompt_is_exactly_this_text():
    assert format_prompt("alpaca", "What is Asthma ?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "What is Asthma ?\n"
        "\n"
        "### Response:\n"
    )


def test_the_input_block_appears_only_when_there_is_an_input():
    assert format_prompt("alpaca", "Sort them.", "b, a") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Sort them.\n"
        "\n"
        "### Input:\n"
        "b, a\n"
        "\n"
        "### Response:\n"
    )
    assert "### Input" not in format_prompt("alpaca", "Sort them.", "")


def test_stanfords_header_speaks_of_the_input_when_there_is_one():
    assert format_prompt("alpaca_stanford", "Sort them.", "b, a").startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSort them.\n\n### Input:\nb, a"
    )
    assert format_prompt("alpaca_stanford", "Sort them.") == format_prompt("alpaca", "Sort them.")


def test_the_plain_prompt_is_the_instruction_and_a_line_end():
    assert format_prompt("plain", "What is Asthma ?") == "What is Asthma ?\n"
    assert format_prompt("plain", "Sort them.", "b, a") == "Sort them.\nb, a\n"


def test_the_alpaca_header_has_24_tokens_with_the_instruction_line_and_the_response_line_6():
    gpt2 = tokenizer.load("gpt2")
    assert len(gpt2.encode(ALPACA_HEADER + TEMPLATES["alpaca"].instruction)) == 24
    assert gpt2.encode(TEMPLATES["alpaca"].response) == [198, 198, 21017, 18261, 25, 198]


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_and_percent_signs_in_a_prompt_stay_as_they_are(template):
    assert "100 % of {input} and {0}" in format_prompt(template, "100 % of {input} and {0}")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("given", ["", "b, a"])
def test_the_first_turn_of_a_conversation_is_a_prompt_and_later_ones_are_the_same_blocks_without_a_header(
    template, given
):
    prompt = format_prompt(template, "Sort them.", given)
    assert format_turn(template, "Sort them.", given) == prompt
    header = TEMPLATES[template].header_with_input if given else TEMPLATES[template].header
    between = "" if header else "\n\n"
    assert format_turn(template, "Sort them.", given, "Be kind.", is_first=False) == between + prompt[len(header) :]
    assert format_turn(template, "Sort them.", given, "Be kind.") == f"Be kind.{between}{prompt[len(header) :]}"


def test_what_a_model_writes_that_answers_itself_is_known_where_a_template_marks_instructions():
    assert end_of_response("alpaca") == end_of_response("alpaca_stanford") == "### Instruction:"
    assert end_of_response("plain") is None


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
