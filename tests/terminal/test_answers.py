"""A model's text reaches a terminal as it is made, and a pipe as a whole; remarks reach stderr."""

import io
import sys

import pytest

from gpt.terminal.answers import remark, show


class Screen(io.StringIO):
    """A terminal's stdout."""

    def isatty(self) -> bool:
        return True


def broken(n: int):
    yield from ["one ", "two "][:n]
    raise ZeroDivisionError


def test_a_terminal_has_each_piece_before_the_next_one_is_made(monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    seen = []

    def texts():
        for text in ("a", "b"):
            seen.append(screen.getvalue())
            yield text

    assert show(texts(), first="\n") == "ab"
    assert seen == ["\n", "\na"] and screen.getvalue() == "\nab\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_are_shown_and_line_ends_stay(monkeypatch, is_terminal):
    monkeypatch.setattr(sys, "stdout", out := Screen() if is_terminal else io.StringIO())
    assert show(["a\x1b", "\n\tb\u202e"]) == "a\x1b\n\tb\u202e"
    assert out.getvalue() == "a\\x1b\n\tb\\u202e\n"


def test_of_a_text_that_an_error_ends_a_pipe_gets_nothing_and_a_terminal_a_line_of_its_own(monkeypatch):
    for out, expected in ((io.StringIO(), ""), (Screen(), "one two \n")):
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(ZeroDivisionError):
            show(broken(2))
        assert out.getvalue() == expected


def test_a_remark_is_a_line_on_stderr(capsys):
    remark("\nprompt: a\x07")
    assert capsys.readouterr() == ("", "\nprompt: a\\x07\n")
