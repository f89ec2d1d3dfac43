"""Writes what an evaluation finds, so that an interrupted one goes on: <name>.json, <name>.jsonl, and a README."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.errors import ENVIRONMENT, UserError
from gpt.evaluation.statistics import Figure
from gpt.files import atomic, directory
from gpt.files.json_file import read_object
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

FORMAT = 1
MARKS = ("*.json",)  # what a folder of results is known by that has no lock


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Nobody else evaluates into `folder` during the `with` block. Raises UserError (6) if somebody does, (5) if it
    cannot be written."""
    with directory.owned(folder, "folder of evaluations", "evaluate another checkpoint", MARKS):
        try:
            yield
        except OSError as error:
            what = f"results not written: {atomic.why_refused(error)}"
            raise UserError(what, str(folder), "make room and start again: it goes on", ENVIRONMENT) from error


class Record:
    """The results of one evaluation while it goes on. `identity` is what they depend on: weights, questions, settings.

    Batches are in <name>.partial.jsonl as soon as they are computed, a line each, the identity first.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        self.path, self.identity = folder / f"{name}.json", identity
        self.rows_path, self._partial = folder / f"{name}.jsonl", folder / f"{name}.partial.jsonl"
        self._batches = self._read()
        if not self._batches:
            self._partial.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """The results, if there are those of this very evaluation. Those of another one are replaced, which is said."""
        if not self.path.is_file():
            return None
        try:
            content = read_object(self.path)
            before = content["identity"]
            if before == self.identity and self.rows_path.is_file():
                if atomic.sha256(self.rows_path) == content["rows_sha256"]:
                    return content
                log.warning(f"{self.rows_path} is not as it was written; it is computed again")
                return None
            changed = differing(before, self.identity)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            changed = f"damaged ({error})"
        log.info(f"{self.path.name} is replaced: {changed}")
        return None

    def computed(self, batch: int) -> bool:
        return batch in self._batches

    def add(self, batch: int, units: list[int], rows: list[dict[str, Any]]) -> None:
        """Keeps what a batch has given."""
        line = json.dumps({"batch": batch, "units": units, "rows": rows}) + "\n"
        with open(self._partial, "a", encoding="utf-8") as file:
            if not self._batches:
                file.write(json.dumps({"identity": self.identity}) + "\n")
            file.write(line)
        self._batches[batch] = (units, rows)

    def rows(self) -> list[dict[str, Any]]:
        """What has been computed, in the order of the units."""
        pairs = [pair for units, rows in self._batches.values() for pair in zip(units, rows, strict=True)]
        return [row for _, row in sorted(pairs, key=lambda pair: pair[0])]

    def publish(self, rows: list[dict[str, Any]], content: dict[str, Any]) -> dict[str, Any]:
        """Writes the files of a finished evaluation and removes the partial one. Returns the content of the .json."""
        atomic.write(self.rows_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        content = {"format": FORMAT, "identity": self.identity, **content}
        content["rows_sha256"] = atomic.sha256(self.rows_path)
        atomic.write(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self._partial.unlink(missing_ok=True)
        atomic.write(self.path.parent / "README.md", readme(self.path.parent))
        return content

    def _read(self) -> dict[int, tuple[list[int], list[dict[str, Any]]]]:
        """The batches of an interrupted evaluation; none where it was another one. A torn last line is left out, and
        the file is written anew without it."""
        try:
            lines = self._partial.read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != {"identity": self.identity}:
                return {}
        except (OSError, ValueError, IndexError):
            return {}
        batches, whole = {}, [lines[0]]
        for line in lines[1:]:
            try:
                content = json.loads(line)
                batches[content["batch"]] = (content["units"], content["rows"])
            except (ValueError, KeyError, TypeError):
                break
            whole.append(line)
        atomic.write(self._partial, "".join(f"{line}\n" for line in whole))
        return batches


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of <name>.jsonl. Texts may have separators of lines such as U+2028, at which `splitlines` would part."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def differing(before: Any, now: Any, key: str = "") -> str:
    """The first value by which two identities differ, by its full key."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*now, *before]):
            if before.get(name) != now.get(name):
                return differing(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    return f"{key} was {escape(str(before)[:80])}, now {escape(str(now)[:80])}"


def as_json(figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    return {system: {name: vars(figure) for name, figure in own.items()} for system, own in figures.items()}


def from_json(values: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    return {system: {name: Figure(**value) for name, value in own.items()} for system, own in values.items()}


def table(figures: dict[str, dict[str, Figure]]) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows: a line for each figure, a column for each system."""
    names = dict.fromkeys(name for own in figures.values() for name in own)
    columns = ["", *figures]
    rows = [{"": name} | {system: str(own[name]) for system, own in figures.items() if name in own} for name in names]
    return columns, rows


def readme(folder: Path) -> str:
    """All results of a folder, a table each."""
    parts = ["# Evaluations"]
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = read_object(path)
            identity, questions = content["identity"], content["identity"]["questions"]
            columns, rows = table(from_json(content["figures"]))
            lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
            weights = ", ".join(f"{name} {digest}" for name, digest in identity["weights"].items())
            parts.append(f"## {path.stem}")
            parts.append(f"Step {identity['step']}; weights (sha256): {weights}. Questions: {questions['source']}, "
                         f"{questions['documents']} documents, sha256 {questions['sha256']}.")  # fmt: skip
            parts.append("\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines))
            parts.append("\n".join(f"- {_plain(sentence)}" for sentence in content["remarks"]))
            parts.append(_plain(content["notice"]))
    parts.append("In brackets: the 95 % interval over questions, by the bootstrap. Each .jsonl has the results of each "
                 "question.")  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    return escape(text).replace("|", "\\|").replace("<", "\\<")
