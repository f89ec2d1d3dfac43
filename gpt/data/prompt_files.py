"""Reads the prompts that a model answers: one that is typed, those of a file, or lines of standard input."""

import functools
import sys
from pathlib import Path

from gpt.config.schema import GenerateConfig
from gpt.data import rows, text_files
from gpt.errors import UserError
from gpt.files import paths

EXAMPLE = 'prompt="What are the symptoms of Glaucoma?"'


def are_typed(cfg: GenerateConfig) -> bool:
    """Whether none are given and a person sits at the terminal, where a conversation opens."""
    has_prompts = cfg.prompt is not None or cfg.prompts is not None
    streams = (sys.stdin, sys.stdout)
    return not has_prompts and cfg.export is None and all(stream and stream.isatty() for stream in streams)


def read(cfg: GenerateConfig) -> list[tuple[str, str]]:
    """(instruction, input) of every prompt. Without `prompt` and `prompts`, standard input has one on each line, unless
    it is a terminal. Raises UserError for none, for an empty one, and for an unusable file."""
    if cfg.prompt is not None and cfg.prompts is not None:
        raise UserError("prompt and prompts are both given", remedy="leave out one of them")
    if cfg.prompt is not None:
        prompts, where = [(cfg.prompt, cfg.input)], "prompt"
    elif cfg.prompts is not None:
        path = paths.absolute(cfg.prompts)
        if not path.is_file():
            raise UserError("no such file", str(path), paths.elsewhere(path) or "it takes a file of texts or of rows")
        prompts, where = of_file(path, cfg.input), str(path)
    else:
        prompts = [(line, cfg.input) for line in of_standard_input()]
        if not prompts:
            remedy = f"for example {EXAMPLE}, prompts=<file>, or lines through a pipe"
            raise UserError("there is no prompt", remedy=remedy)
        where = "standard input"
    if not prompts or not all(instruction.strip() for instruction, _ in prompts):
        raise UserError("the prompt is empty", where, "give at least one word")
    return prompts


def of_file(path: Path, given: str) -> list[tuple[str, str]]:
    """(instruction, input) of every row of a file in one of rows.FORMATS, or of every line of a text file; `given` is
    the input of those without."""
    if rows.format_of(path) is None:
        return [(line.strip(), given) for line in text_files.read_text(path).split("\n") if line.strip()]
    bad = rows.BadRows("error", setting=None)
    prompts = []
    for row, cells in rows.read_known(path, bad, "prompts"):
        own = cells.get("input")
        prompts.append((cells["instruction"], given if own is None else own))
        if not all(isinstance(part, str) for part in prompts[-1]):
            bad.report(row.where, row.line, "instruction, and input where there is one, must be texts")
    return prompts


@functools.cache  # each job of -m asks, and it can be read once
def of_standard_input() -> list[str]:
    """The lines that are not empty. None are read from a terminal, where somebody would wonder what is waited for."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    try:
        content = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start + 1}", "standard input", "convert it to UTF-8") from error
    except OSError:  # a descriptor that is closed, or no file
        return []
    return [line.strip() for line in content.splitlines() if line.strip()]
