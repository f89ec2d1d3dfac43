"""A chat of one turn is an instruction and an output; others are none."""

import pytest

from gpt.data import chats
from gpt.data.chats import Chat

TURN = Chat("Why ?", "So.", [])
USER = {"role": "user", "content": "Why ?"}


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
            Chat("Why ?", "So.", ["system"]),
        ),
        ([USER, {"role": "assistant", "content": "So.", "reasoning_content": "Hm.", "weight": 0, "name": ""}],
         Chat("Why ?", "So.", ["reasoning_content", "weight"])),
        ([USER], None),
        ([{"role": "assistant", "content": "So."}, {"role": "user", "content": "Why ?"}], None),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2, None),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], None),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], None),
        ([USER, {"role": "assistant", "content": "Let me look.", "tool_calls": [{"id": "1"}]}], None),
        ([USER, {"role": "assistant", "content": None}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
          {"role": "assistant", "content": "b"}], None),
        ([{"role": None, "content": None, "from": "human", "value": "Why ?"},
          {"role": None, "content": None, "from": "gpt", "value": "So.", "tool_calls": None}], TURN),
    ],
)  # fmt: skip
def test_openai_and_sharegpt_write_the_same_turn(messages, expected):
    assert chats.read(messages) == expected


@pytest.mark.parametrize(
    "messages",
    ["user: Why ?", [], None, [1, 2], [{"role": "user"}, {"role": "assistant", "content": None}], [{"value": "a"}]],
)  # fmt: skip
def test_what_is_no_chat_is_a_bad_row(messages):
    with pytest.raises(ValueError, match=r"^messages: "):
        chats.read(messages)
