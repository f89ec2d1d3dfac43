"""Makes HTML from texts that are not trusted: escaped, with control characters shown, and long ones shortened."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gpt.sweeps.jobs import is_number, shown
from gpt.terminal.console import escape


def text(value: object, longest: int | None = None, keep_newlines: bool = False) -> str:
    """HTML of a text, fit for a quoted attribute too. Of one longer than `longest`, its begin and its end."""
    return html.escape(shortened(escape(str(value), keep_newlines), longest))


def shortened(plain: str, longest: int | None) -> str:
    """A text of at most `longest` characters, of a longer one begin and end: names may differ in either."""
    if longest is None or len(plain) <= longest:
        return plain
    end = longest // 3
    return f"{plain[: longest - end - 3]} … {plain[len(plain) - end :]}"


def listing(texts: Iterable[object]) -> str:
    items = "".join(f"<li>{text(one)}</li>" for one in texts)
    return f"<ul>{items}</ul>" if items else ""


def table(header: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """`header` are texts, `rows` are HTML. It scrolls where it is wider or longer than its place."""
    # A long name may break after a dot or an underscore.
    names = [re.sub("([._])", r"\1<wbr>", text(name, 120)) for name in header]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "\n".join(rows)
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n"
    )


def cell(value: Any, digits: int | None = None, longest: int = 120) -> str:
    """A cell of a table. Numbers stand to the right; with `digits`, so many decimals."""
    if value is None:
        plain = ""
    elif is_number(value) and digits is not None:
        plain = f"{value:,.{digits}f}"
    else:
        plain = shortened(shown(value), longest)
    kind = "number" if is_number(value) else "long" if len(plain) > 24 else ""
    return f'<td class="{kind}">{html.escape(plain)}</td>' if kind else f"<td>{html.escape(plain)}</td>"
