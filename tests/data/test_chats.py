"""A chat of one turn is an instruction and an output; others are none."""

import pytest

from gpt.data import chats

TURN = {"instruction": "Why ?", "output": "So."}


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([{"role": "user", "content": "Why ?"}, {"role": "assistant", "content": "So."}], TURN),
        ([{"from": "human", "value": "Why ?"}, {"from": "gpt", "value": "So."}], TURN),
        ([{"role": "Human", "value": "Why ?"}, {"role": "bot", "content": "So."}], TURN),
        (
            [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": " ?"}]},
                {"role": "assistant", "content": "So.", "refusal": None},
            ],
            {"system": "Be short.", **TURN},
        ),
        ([{"role": "user", "content": "Why ?"}], None),
        ([{"role": "assistant", "content": "So."}, {"role": "user", "content": "Why ?"}], None),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2, None),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], None),
    ],
)
def test_openai_and_sharegpt_write_the_same_turn(messages, expected):
    assert chats.read(messages) == expected


@pytest.mark.parametrize(
    "messages",
    ["user: Why ?", [], None, [1, 2], [{"role": "user"}, {"role": "assistant", "content": None}], [{"value": "a"}],
     [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "b"}]],
)  # fmt: skip
def test_what_is_no_chat_is_a_bad_row(messages):
    with pytest.raises(ValueError, match=r"^messages: "):
        chats.read(messages)
