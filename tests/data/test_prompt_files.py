"""Prompts come from the command line, a file, or standard input; tests/test_generate.py has the files."""

import io
import sys

import pytest
from test_generate import settings

from gpt.data import prompt_files
from gpt.errors import UserError


class Stream:
    """A standard input of these bytes."""

    def __init__(self, content: bytes, is_terminal: bool = False) -> None:
        self.buffer, self.isatty = io.BytesIO(content), lambda: is_terminal


@pytest.fixture(autouse=True)
def nothing_read():
    prompt_files.of_standard_input.cache_clear()
    yield
    prompt_files.of_standard_input.cache_clear()


@pytest.mark.parametrize(
    ("stream", "lines"),
    [
        (Stream(b"\xef\xbb\xbfa b \r\n\n  c\n"), ["a b", "c"]),
        (Stream(b"\n"), []),
        (Stream(b"a\n", is_terminal=True), []),
        (None, []),
    ],
    ids=["lines", "none", "a terminal", "closed"],
)
def test_each_line_of_standard_input_that_is_not_empty_is_a_prompt(stream, lines, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stream)
    assert prompt_files.of_standard_input() == lines


def test_what_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stream(b"ab\xff"))
    with pytest.raises(UserError, match=r"not UTF-8 at byte 3 \(standard input\)"):
        prompt_files.of_standard_input()


@pytest.mark.parametrize(
    ("stdin", "stdout", "changes", "are_typed"),
    [
        (True, True, {}, True),
        (True, True, {"prompt": ""}, False),
        (True, True, {"prompts": "a.txt"}, False),
        (True, True, {"export": "folder"}, False),
        (False, True, {}, False),
        (True, False, {}, False),  # > answers.txt, where the prompts would be missing
        (None, True, {}, False),  # closed
    ],
)
def test_a_conversation_opens_where_none_are_given_and_a_person_sits_at_the_terminal(
    stdin, stdout, changes, are_typed, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", None if stdin is None else Stream(b"", stdin))
    monkeypatch.setattr(sys, "stdout", Stream(b"", stdout))
    assert prompt_files.are_typed(settings("unused", **changes)) == are_typed
