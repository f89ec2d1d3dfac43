"""What becomes of a row on its way to a record, and what is counted."""

import pytest
from conftest import data_config

from gpt.data import records
from gpt.data.rows import BadRows, Row
from gpt.errors import UserError


def clean(values, policy="error", **config):
    rows = [Row("x/data.csv", line, row) for line, row in enumerate(values, start=2)]
    found = records.Cleaned()
    given = list(records.clean(rows, data_config(**config), BadRows(policy), found))
    assert given == found.records
    return found


def qa(question="q", answer="a", **more):
    return {"question": question, "answer": answer, **more}


def test_questions_and_answers_lose_surplus_whitespace_of_every_kind():
    record = clean([qa("  What\tis \r\n\u2003it ?", "a\u00a0 b\n\n- c\u2028d")]).records[0]
    assert (record.instruction, record.input, record.output) == ("What is it ?", "", "a b - c d")


def test_an_answer_that_says_NA_is_kept():
    kept = clean([qa("q1", "NA"), qa("q2", "None"), qa("q3", "n/a")]).records
    assert [record.output for record in kept] == ["NA", "None", "n/a"]


def test_the_ladder_counts_rows_answers_and_distinct_records():
    found = clean([qa(), qa("q ", "a"), qa("q", "b"), qa("q2", " \n"), qa("q3", None)])
    assert found.ladder == [("rows", 5), ("with an answer", 3), ("without exact duplicates", 2)]


def test_rows_that_are_bad_or_ask_nothing_have_steps_of_their_own():
    found = clean([qa(), qa(""), qa(answer=5)], policy="skip")
    assert found.ladder == [
        ("rows", 3), ("well-formed", 2), ("with a question", 1), ("with an answer", 1), ("without exact duplicates", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "source": "s", "focus_area": "f"},
        {"question": "q", "answer": "a", "document_source": "s", "question_focus": "f", "synonyms": None},
        {" Question": "q", "ANSWER ": "a", "Source": "s", "Focus_Area": "f"},
    ],
)
def test_columns_are_found_by_the_names_that_publishers_give_them(row):
    record = clean([row]).records[0]
    assert (record.instruction, record.output, record.source, record.focus) == ("q", "a", "s", "f")


def test_a_copy_without_focus_areas_is_stratified_by_its_question_type():
    record = clean([{"qtype": "symptoms", "Question": "q", "Answer": "a"}]).records[0]
    assert (record.source, record.focus) == ("symptoms", "")


def test_a_column_may_be_named_in_the_configuration():
    record = clean([{"question": "not this", "Ask": "q", "answer": "a"}], columns={"question": "ask"}).records[0]
    assert record.instruction == "q"


@pytest.mark.parametrize(
    "row, columns, expected",
    [
        ({"text": "t", "answer": "a"}, {}, "data.csv:2: no column question among text, answer; data.columns.question="),
        (qa(), {"answer": "reply"}, "data.csv:2: no column reply among question, answer; data.columns.answer="),
        (qa(), {"source": "from"}, "no column from among question, answer; data.columns.source="),
        (qa(), {"anwser": "x"}, "data.columns: anwser is not one of question, answer, source, focus_area"),
        (qa(answer=[1]), {}, "data.csv:2: answer is list [1], text is needed"),
    ],
)
def test_what_is_wrong_with_the_columns_is_said_with_the_key_to_set(row, columns, expected):
    with pytest.raises(UserError) as caught:
        clean([row], columns=columns)
    assert expected in str(caught.value)
    assert caught.value.code == 2


def test_nothing_left_is_an_error_that_gives_the_counts():
    with pytest.raises(UserError, match="no record is left: 2 rows, 0 with an answer"):
        clean([qa(answer=""), qa("q2", "")])
    with pytest.raises(UserError, match=r"no record is left: 1 rows, 0 well-formed.*data.csv:2: no column question"):
        clean([{"a": "b"}], policy="skip")


def test_instructions_keep_their_text_as_it_is():
    row = {"instruction": "indent:\n", "input": "if x:\n    y", "output": "  z\n"}
    record = clean([row], kind="alpaca").records[0]
    assert (record.instruction, record.input, record.output) == tuple(row.values())


def test_an_instruction_needs_no_input():
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": None, "output": "d"}]
    assert [record.input for record in clean(rows, kind="alpaca").records] == ["", ""]


def test_scores_of_helpsteer_are_collected_from_all_rows():
    rows = [{"prompt": "p", "response": f"r{i}", "helpfulness": i, "verbosity": 2} for i in range(5)]
    found = clean([*rows, {"prompt": "p", "response": "", "helpfulness": 4, "verbosity": None}], kind="helpsteer")
    assert found.records[0].instruction == "p" and len(found.records) == 5
    statistics = records.score_statistics(found.scores)
    assert statistics["helpfulness"]["count"] == 6 and statistics["helpfulness"]["mean"] == pytest.approx(
        14 / 6, abs=1e-4
    )
    assert statistics["verbosity"]["count"] == 5 and statistics["verbosity"]["std"] == 0


@pytest.mark.parametrize("score", ["three", "nan", True, float("nan"), [1]])
def test_a_score_that_is_no_number_is_a_bad_row(score):
    with pytest.raises(UserError, match=r"data.csv:2: helpfulness is .*, a number is needed"):
        clean([{"prompt": "p", "response": "r", "helpfulness": score}], kind="helpsteer")


def test_oddities_are_counted():
    found = clean([qa("q", "a"), qa("q", "b"), qa("r", "a", focus_area="f"), qa("s", "two  spaces " + "x" * 50)])
    assert records.oddities(found) == {
        "questions with several answers": 1,
        "times the most frequent answer occurs": 2,
        "answers under 50 characters": 3,
        "answers whose whitespace was normalised": 1,
        "rows without a focus area": 3,
    }


def test_columns_that_are_not_learned_from_are_said_with_the_share_of_rows_that_have_them():
    rows = [{"instruction": f"i{i}", "output": "o", "history": [["a", "b"]] * (i % 2), "system": ""} for i in range(4)]
    found = clean([*rows, {"instruction": "j", "output": "o", "tag\x1b": 0}], kind="alpaca")
    assert records.describe_left_out(found) == [
        "not learned from, with the share of rows that have it: history (40.0%), tag\\x1b (20.0%)"
    ]
    assert records.describe_left_out(clean([qa(source="s", focus_area="f")])) == []


def test_chats_of_one_turn_are_records_and_others_are_counted_and_said():
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = {"role": "system", "content": "Be Marv."}
    rows = [{"messages": turn}, {"messages": [system, turn[0], {"role": "assistant", "content": "b"}]}]
    found = clean([*rows, {"messages": turn * 2}, {"messages": 3}], policy="skip", kind="alpaca")
    assert [(record.instruction, record.output) for record in found.records] == [("q", "a"), ("q", "b")]
    assert found.ladder[:3] == [("rows", 4), ("well-formed", 3), ("of one question and answer", 2)]
    assert [line[:50] for line in records.describe_left_out(found)] == [
        "not learned from, with the share of rows that have", "1 of 3 rows are left out as a whole: chats of seve"
    ]  # fmt: skip


def test_where_only_chats_of_several_turns_are_there_the_error_says_what_they_are():
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"no record is left: 1 rows, .*; 1 of 1 rows .* chats of several turns"):
        clean([{"messages": turn * 2}], kind="alpaca")


def test_scores_may_be_written_as_text_and_be_missing():
    row = {"prompt": "p", "response": "r", "helpfulness": "4", "correctness": "3.0", "verbosity": ""}
    assert clean([row], kind="helpsteer").scores == {"helpfulness": [4.0], "correctness": [3.0]}
