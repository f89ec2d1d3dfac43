"""Finds the columns of rows by the names that publishers give them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpt.terminal.console import escape

# Our name of a column -> the names that publishers give it, compared without case.
COLUMNS = {
    "qa": {
        "question": ["question"],
        "answer": ["answer"],
        "source": ["source", "document_source", "qtype"],  # medquad.csv, lavita/MedQuAD, keivalya's copy
        "focus_area": ["focus_area", "question_focus"],
    },
    "helpsteer": {"prompt": ["prompt"], "response": ["response"]},
    "alpaca": {"instruction": ["instruction"], "input": ["input"], "output": ["output", "response"]},
    "prompts": {"instruction": ["instruction", "prompt", "question"], "input": ["input"]},
    "references": {
        "instruction": ["instruction", "prompt", "question"],
        "input": ["input"],
        "output": ["output", "response", "answer", "reference"],
        "source": ["source", "document_source", "qtype"],
        "focus_area": ["focus_area", "question_focus"],
    },
    "examples": {"instruction": ["instruction"], "input": ["input"], "output": ["output"]},
}
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}  # of the fields of CSV, by the words for them
CHATS = ["messages", "conversations", "conversation"]  # what instructions may have instead: gpt/data/chats.py
OPTIONAL = {"source", "focus_area", "input"}


@dataclass(frozen=True)
class Wanted:
    """What is known of the rows of a file before it is read: the kind of its columns and their names where a person
    gave them, and how it is written. `kind` None: every column is wanted."""

    kind: str | None = None
    chosen: Mapping[str, str | None] = field(default_factory=dict)
    delimiter: str | None = None
    encoding: str | None = None

    def fits(self, names: Iterable[str]) -> bool:
        """Whether all columns that are needed are among some names."""
        try:
            return self.kind is None or bool(find(names, self.kind, self.chosen))
        except NoColumn:
            return False

    def used(self, names: Sequence[str]) -> set[str]:
        """Those of some names whose columns are needed; all of them where it cannot be known."""
        is_known = self.kind is not None and self.fits(names)
        return set(find(names, self.kind, self.chosen).values() if is_known else names)


class NoColumn(ValueError):
    """A column that is needed and not there; `remedy` names the key to set."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


def find(names: Iterable[str], kind: str, chosen: Mapping[str, str | None]) -> dict[str, str]:
    """Our name of each column -> its name in the data: the one in `chosen` first, else a known one, whatever its case.
    Instructions that lack a column may have `messages` instead of all. Raises NoColumn."""
    by_name: dict[str, str] = {}
    for name in names:
        by_name.setdefault(name.strip().casefold(), name)
    columns, missing = {}, {}
    for name, aliases in COLUMNS[kind].items():
        wanted = chosen.get(name)
        keys = [alias.strip().casefold() for alias in ([wanted] if wanted else aliases)]
        column = next((by_name[key] for key in keys if key in by_name), None)
        if column is not None:
            columns[name] = column
        elif wanted or name not in OPTIONAL:
            missing[name] = wanted or " or ".join(aliases)
    chat = next(filter(by_name.get, CHATS), None)
    if missing and chat and kind == "alpaca" and not any(chosen.values()):
        return {"messages": by_name[chat]}
    if missing:
        present = ", ".join(map(escape, by_name.values())) or "none"
        problem = f"no column {', no column '.join(missing.values())} among {present}"
        raise NoColumn(problem, _remedy(list(missing), kind, list(by_name.values())))
    return columns


def _remedy(missing: list[str], kind: str, present: list[str]) -> str:
    if kind in ("prompts", "references", "examples"):
        return f"name a column {' and one '.join(missing)}"
    words = [word for word, mark in DELIMITERS.items() if len(present) == 1 and mark in present[0]]
    other = f", or data.delimiter={words[0]} if that is what stands between the columns" if words else ""
    return " ".join(f"data.columns.{name}=<its name here>" for name in missing) + other


def listed(names: Sequence[str], n_shown: int = 10) -> str:
    """Names for a message, the first ones where there are many."""
    shown = ", ".join(escape(name[:40]) for name in names[:n_shown])
    return shown + (f" and {len(names) - n_shown} more" if len(names) > n_shown else "")
