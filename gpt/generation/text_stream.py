"""Turns token ids that come one after another into text that can be shown as it comes."""

from collections.abc import Callable, Iterable, Iterator, Sequence

REPLACEMENT = "\ufffd"  # what bytes decode to that are no UTF-8, and those of a character that is not whole yet


def pieces(ids: Iterable[int], decode: Callable[[list[int]], str], stop: Sequence[str]) -> Iterator[str]:
    """Yields the text of `ids` in pieces, each as soon as it is certain. Together they are `decode` of all ids, up to
    where the first of the strings `stop` begins; once one of them is complete, no more ids are taken."""
    return before(stop, whole_characters(ids, decode))


def whole_characters(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yields the text of `ids` in pieces that end between characters, though many tokens are only a part of one.

    `decode` has to put the bytes of the tokens together, as those of gpt/tokenizer.py do: the bytes of a character that
    is not complete then become one U+FFFD at the end, and nothing before it can change any more (Unicode 16, section
    3.9, "maximal subparts")."""
    pending: list[int] = []  # ids since the text last ended with a whole character
    n_shown = 0  # characters of their text that have been yielded
    text = ""
    for token in ids:
        pending.append(token)
        text = decode(pending)
        certain = text.removesuffix(REPLACEMENT)
        if len(certain) > n_shown:
            yield certain[n_shown:]
        n_shown = len(certain)
        if certain == text:
            pending, n_shown, text = [], 0, ""
    if text[n_shown:]:
        yield text[n_shown:]


def before(stop: Sequence[str], texts: Iterable[str]) -> Iterator[str]:
    """Yields `texts` up to where the first of the strings `stop` begins: the first one that is complete, and of those
    that end at the same character the longest. The end of a piece waits as long as it may be the beginning of one."""
    held = ""
    for text in texts:
        held += text
        found = [(at + len(string), at) for string in stop if (at := held.find(string)) >= 0]
        if found:
            _, at = min(found)
            if at:
                yield held[:at]
            return
        kept = max((n_begun(held, string) for string in stop), default=0)
        if len(held) > kept:
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    if held:
        yield held


def n_begun(text: str, string: str) -> int:
    """How many characters at the end of `text` are the beginning of `string`, without being all of it."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if string.startswith(text[-n:])), 0)
