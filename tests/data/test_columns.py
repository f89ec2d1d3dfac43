"""Columns are found by their usual names, and what is not found is named with what to set."""

import pytest

from gpt.data.columns import NoColumn, Wanted, find, listed


def test_names_are_compared_without_case_and_a_chosen_one_comes_first():
    assert find(["Question ", "ANSWER", "qtype"], "qa", {}) == {
        "question": "Question ", "answer": "ANSWER", "source": "qtype"
    }  # fmt: skip
    assert find(["question", "answer", "long"], "qa", {"answer": "Long"})["answer"] == "long"


@pytest.mark.parametrize(
    "names, kind, remedy",
    [
        (["Frage", "Antwort"], "qa", "data.columns.question=<its name here>"),
        (["Frage;Antwort"], "qa", "or data.delimiter=semicolon if that is what stands between the columns"),
        (["text"], "prompts", "name a column instruction"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there_and_what_to_do(names, kind, remedy):
    with pytest.raises(NoColumn, match=f"among {', '.join(names)}") as caught:
        find(names, kind, {})
    assert remedy in caught.value.remedy


def test_a_chat_stands_for_the_columns_of_instructions_only_where_these_are_missing():
    assert find(["id", "Messages"], "alpaca", {}) == {"messages": "Messages"}
    assert find(["messages", "instruction", "output"], "alpaca", {}).keys() == {"instruction", "output"}
    assert not Wanted("qa").fits(["messages"])


def test_many_names_are_listed_in_part():
    assert listed([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
