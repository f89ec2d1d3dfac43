"""Prints what a person sees in the terminal: log lines, errors, the progress bar and tables.

Results and ordinary lines go to stdout, warnings and errors to stderr; of generate.py, whose result is a text, ordinary
lines too. Colours and the bar appear on a terminal only.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gpt.config.schema import MEAN_METRIC, METRIC
from gpt.errors import one_line

log = logging.getLogger(__name__)

LONGEST_REFERENCE = 300  # characters
LOSSES = (METRIC, "val/bpb")  # in tables they keep zeros at their end, to be compared down the column
YELLOW, RED = "33", "31"
# Unicode categories of what moves the cursor, turns text around or cannot be seen: control, format, separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_quiet = False  # this process shares the terminal with others like it
_all_to_stderr = False  # stdout is for results alone


def escape(text: str, keep_newlines: bool = False) -> str:
    r"""Text that is safe to print: control and invisible characters shown as \x1b or \u202e, all others untouched.

    With `keep_newlines`, line feeds and tabs stay what they are.
    """
    kept = "\n\t" if keep_newlines else ""
    return "".join(
        c if c in kept or unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode() for c in text
    )


class _Lines(logging.Formatter):
    """`text` for ordinary lines, `warning: text` and `error: text` for the others."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + escape(record.getMessage(), keep_newlines=True)


class _TimedLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        return f"{self.formatTime(record)} {super().format(record)}"


class _Terminal(logging.Handler):
    """Writes to whatever sys.stdout and sys.stderr are at that moment: the progress bar replaces both."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            _print_prefixed(line, RED if record.levelno >= logging.ERROR else YELLOW)
        elif not _quiet or getattr(record, "announced", False):
            print(line, file=sys.stderr if _all_to_stderr else sys.stdout, flush=True)


class _LogFile(logging.FileHandler):
    """A log file that may become impossible to write: then one warning and no more lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger("gpt").removeHandler(self)
        log.warning(f"log file {self.baseFilename}: {sys.exc_info()[1]}; no more lines are written to it")


def setup(quiet: bool = False, all_to_stderr: bool = False, silent: bool = False) -> None:
    """Sends what this project logs to the terminal; `quiet`: only warnings, errors and what is announced; `silent`:
    only errors. With `all_to_stderr` ordinary lines go there too."""
    global _quiet, _all_to_stderr
    _quiet, _all_to_stderr = quiet or silent, all_to_stderr
    logger = logging.getLogger("gpt")
    logger.setLevel(logging.ERROR if silent else logging.INFO)
    logger.propagate = False  # Hydra and wandb hang handlers of their own on the root logger
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        handler = _Terminal()
        handler.setFormatter(_Lines())
        logger.addHandler(handler)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends every log line to the file `path` as well, with the time. A file that cannot be written is a warning."""
    logger = logging.getLogger("gpt")
    logger.setLevel(logging.INFO)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning(f"log file {path}: {error.strerror}; nothing is written to it")
        yield
        return
    handler.setFormatter(_TimedLines())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # the rest of a line that the disk has refused already
            handler.close()


def say(text: str) -> None:
    """One ordinary line, in the log file too."""
    log.info(text)


def announce(text: str) -> None:
    """One ordinary line that a quiet process shows as well."""
    log.info(text, extra={"announced": True})


def describe(**facts: str) -> None:
    """A short aligned list, `name  text` on each line."""
    width = max(map(len, facts))
    for name, text in facts.items():
        say(f"{name:<{width}}  {text}")


def show_samples(samples: list[dict[str, str]]) -> None:
    """Texts as {"prompt", "text"} that a model has written, indented, with control characters escaped; below each the
    beginning of its "reference", if it has one."""
    for sample in samples:
        say("sample: " + " ".join(sample["prompt"].split()))
        say(textwrap.indent(sample["text"].strip() or "(nothing)", "    "))
        if "reference" in sample:
            say("  reference: " + textwrap.shorten(sample["reference"], LONGEST_REFERENCE, placeholder=" ..."))


def count(number: int, noun: str) -> str:
    """1 step, 1,200 steps"""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def error(text: str) -> None:
    """One line `error: <text>` on stderr."""
    _print_prefixed(f"error: {escape(one_line(text))}", RED)


def _print_prefixed(line: str, colour: str) -> None:
    if _is_terminal(sys.stderr) and "NO_COLOR" not in os.environ:
        prefix, rest = line.split(":", 1)
        line = f"\x1b[{colour}m{prefix}:\x1b[0m{rest}"
    print(line, file=sys.stderr, flush=True)


def save_traceback(error: BaseException, path: Path) -> Path:
    """Writes the traceback to `path`, or to a temporary file where that is not possible. Returns the file's path."""
    text = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return path
    except OSError:
        with tempfile.NamedTemporaryFile(
            "w", prefix="traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
        return Path(file.name)


class ProgressBar:
    """Where a run is: on a terminal a bar with step, loss, lr, tokens/s and the time left, else a line per row.

    Used as a context manager; while it is open, log lines and print() appear above the bar.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._first = total_steps, first_step
        self._bar: Any = None  # rich.progress.Progress
        self._shown: dict[str, float | int] = {}

    def __enter__(self) -> "ProgressBar":
        if _is_terminal(sys.stdout) and not _quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            terminal = Console(highlight=False)
            details = [TextColumn("{task.fields[details]}", markup=False)] if terminal.width >= 80 else []
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None if terminal.width < 100 else 30),
                *details,
                TimeRemainingColumn(compact=True),
                console=terminal,
                refresh_per_second=4,
                speed_estimate_period=600,  # seconds: rows of a slow run may be minutes apart
                redirect_stderr=_is_terminal(sys.stderr),
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first, details="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, row: dict[str, float | int]) -> None:
        """Shows one row of metrics; it needs the key `step`."""
        is_evaluation = METRIC in row
        if self._bar is None or is_evaluation:
            log.info("  ".join([f"step {row['step']}/{self._total}", *_details(row)]))
        if self._bar is not None:
            self._shown |= {key: value for key, value in row.items() if not key.startswith("val/")}
            self._bar.update(self._task, completed=row["step"], details="  ".join(_details(self._shown)))


def _details(row: dict[str, float | int]) -> list[str]:
    formats = {key: f"{key} {{:.3f}}" for key in ("train/loss", METRIC, MEAN_METRIC, "val/bpb")}
    formats |= {"lr": "lr {:.1e}", "tokens_per_second": "{:,.0f} tokens/s"}
    return [text.format(row[key]) for key, text in formats.items() if key in row]


def progress(text: str) -> None:
    """On a terminal, one line that the next one replaces; an empty text clears it."""
    if _is_terminal(sys.stderr) and not _quiet:
        print(f"\r\x1b[K{escape(text)}", end="", file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]], columns: list[str], least_important: Sequence[str] = ()) -> str:
    """Rows as aligned text under a header, made to fit the terminal.

    Where it is narrow, names of columns lose what stands before their last dot; then `least_important` columns are left
    out, the first of them first. Only then texts are shortened, and the last columns left out. Numbers are never cut.
    """
    available = width()
    full, short = {column: column for column in columns}, short_names(columns)
    for n_without in range(-1, len(least_important) + 1):
        left = [column for column in columns if column not in least_important[: max(n_without, 0)]]
        names = [escape((full if n_without < 0 else short)[column]) for column in left]
        cells = [[_cell(row.get(column), column in LOSSES) for row in rows] for column in left]
        widths = [max(map(len, [name, *column])) for name, column in zip(names, cells, strict=True)]
        if _width(widths) <= available:
            break
    is_number = [all(isinstance(row.get(column), int | float | None) for row in rows) for column in left]
    least = [
        max(map(len, column), default=1) if number else min(4, width)
        for column, number, width in zip(cells, is_number, widths, strict=True)
    ]
    while _width(widths) > available:
        longest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
        if widths[longest] > least[longest]:
            widths[longest] -= 1
        elif len(widths) > 1:
            widths.pop()
        else:
            break
    lines = zip(*([name, *column] for name, column in zip(names, cells, strict=True)), strict=True)
    return "\n".join("  ".join(map(_fit, line, widths, is_number)).rstrip() for line in lines)


def width() -> int:
    """Of the terminal. In a pipe nothing is known about the reader: wide enough for a table of a sweep."""
    return shutil.get_terminal_size(fallback=(160, 24)).columns


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """{"optimizer.lr": "lr"}: what stands behind the last dot, where no other key has the same there."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if name and last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def wrapped(text: str) -> str:
    """Sentences broken between words where the terminal ends; in a pipe they stay on one line."""
    width = shutil.get_terminal_size(fallback=(sys.maxsize, 24)).columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _width(widths: Sequence[int]) -> int:
    """Of a line with columns so wide, and two spaces between them."""
    return sum(widths) + 2 * (len(widths) - 1)


def _fit(cell: str, width: int, to_the_right: bool) -> str:
    cell = cell if len(cell) <= width else (cell[: max(width - 2, 0)] + "..")[:width]
    return cell.rjust(width) if to_the_right else cell.ljust(width)


def _cell(value: Any, is_loss: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 2**53 else f"{value:#.4g}" if is_loss else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"
