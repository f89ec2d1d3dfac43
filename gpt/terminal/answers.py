"""Prints what a model writes to stdout, and remarks about it to stderr."""

import sys
from collections.abc import Iterable

from gpt.terminal.console import escape
from gpt.terminal.output import check_output


def show(texts: Iterable[str], first: str = "") -> str:
    r"""Prints a text to stdout, after `first`, and ends its line; control characters as \x1b. Returns the text.

    A terminal gets each piece at once; a pipe or a file gets the whole text, and nothing of one that an error ends.
    Raises UserError (5) where it cannot be written, as on a full disk.
    """
    texts = texts if sys.stdout.isatty() else ["".join(texts)]
    shown = ""
    print(first, end="")
    try:
        for text in texts:
            shown += text
            print(escape(text, keep_newlines=True), end="", flush=True)
    finally:  # also after a signal, whose message comes next
        print(flush=True)
    check_output()
    return shown


def announce_prompt(instruction: str, given: str) -> None:
    """Says what is answered; `given`: its input."""
    remark(f"\nprompt: {escape(instruction)}" + (f"\ninput: {escape(given)}" if given else ""))


def announce_sample(number: int, n_samples: int) -> None:
    """Says which of the samples of a prompt follows, where there are several."""
    if n_samples > 1:
        remark(f"\nsample {number} of {n_samples}:")


def remark(text: str) -> None:
    """A line about the text that is generated, which a pipe or a file does not get."""
    print(escape(text, keep_newlines=True), file=sys.stderr, flush=True)
