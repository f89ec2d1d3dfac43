"""Opens what a model is evaluated on: a split of prepared data, a file of questions with references, or a text."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data import preparation, prepared, rows, sources, text_files, topics
from gpt.data.batching import Split
from gpt.data.prepared import Prepared
from gpt.errors import UserError
from gpt.evaluation.settings import EvaluateConfig
from gpt.evaluation.subject import Subject
from gpt.files import paths
from gpt.files.paths import PROJECT_ROOT
from gpt.prompts import Question, format_prompt, read_prompt
from gpt.terminal.console import escape
from gpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """The training split that answers are compared with: what the model was trained on, where that is known."""

    data: Prepared

    @cached_property
    def questions(self) -> list[Question]:
        """Its questions with their answers; none of running text."""
        return _questions(self.data, "train") if self.data.meta["settings"]["kind"] != "text" else []

    @cached_property
    def texts(self) -> list[str]:
        """All of its texts, without the template."""
        if self.questions:
            return [text_of(question) for question in self.questions]
        tokens, split = self.data.tokens, Split.open(self.data.folder, "train")
        return [tokens.decode(split.ids[start:end].tolist()) for start, _, end in split.documents]

    @cached_property
    def counts(self) -> np.ndarray:
        """(V,) how often each token occurs."""
        ids = Split.open(self.data.folder, "train").ids
        return np.bincount(ids, minlength=self.data.tokens.n_vocab)


@dataclass(frozen=True)
class Part:
    """What is asked: documents in the tokens of the model, and for those with questions what they are in words."""

    source: str
    split: Split
    mask: str  # which tokens are scored: response (and end of text), or all
    questions: list[Question]  # one for each document; none for running text
    topics: list[tuple[str, str]]  # focus and source of each, "" where they are not known
    training: Training | None
    whole: "Part | None" = None  # that these are the first questions of
    beside: Training | None = None  # the training split of the data that is asked about, where it is of other data

    @property
    def retrieved(self) -> list[Question]:
        """Training questions with the answers that baselines give: those of the model's own training data; where that
        is running text, those of the data that is asked about."""
        own = self.training.questions if self.training else []
        return own or (self.beside.questions if self.beside else [])

    @cached_property
    def sha256(self) -> str:
        """Of the questions and references, or of the tokens of a text."""
        if not self.questions:
            ids = self.split.ids
            return hashlib.sha256(ids.astype(ids.dtype.newbyteorder("<")).tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([identity(question) for question in self.questions]).encode()).hexdigest()

    @cached_property
    def ids(self) -> list[str]:
        """A name for each question, by which it is known in other results, too."""
        hashes = [hashlib.sha256(json.dumps(identity(q)).encode()).hexdigest()[:12] for q in self.questions]
        return hashes if len(set(hashes)) == len(hashes) else [f"{h}-{i}" for i, h in enumerate(hashes)]

    def prompt(self, number: int) -> list[int]:
        start, response, _ = self.split.documents[number]
        return self.split.ids[start:response].tolist()

    def need_questions(self, kind: str) -> None:
        """Raises UserError for running text."""
        if not self.questions:
            raise UserError(f"evaluate={kind} needs questions", self.source, "this is running text; evaluate=loss can")


def identity(question: Question) -> list[str | None]:
    return [question.instruction, question.input, question.reference]


def text_of(question: Question) -> str:
    """All words of a question and its reference."""
    return f"{question.instruction} {question.input} {question.reference}"


def open_part(cfg: EvaluateConfig, subject: Subject, typed: Sequence[str] = ()) -> Part:
    """What the model is evaluated on: cfg.file, else cfg.data, else the data that its run was trained on. `typed`: the
    overrides. Raises UserError (2) where there is none of these, and for a part without documents."""
    try:
        own = of_run(subject)
    except UserError as error:
        if cfg.file is None and cfg.data is None:
            raise
        own = None
        log.warning(f"{error.what}; answers are not compared with it")
    if cfg.file is not None:
        part = of_file(paths.absolute(cfg.file), subject, own and Training(own))
    else:
        data = own
        if cfg.data is not None:
            data = preparation.ensure(cfg.data, PROJECT_ROOT, sources.path_is_typed(typed, run_dir=None))
        if data is None:
            what = "no data is known: these weights are not of a run of this project"
            raise UserError(what, str(subject.path), "give data=medquad, or file=questions.jsonl")
        part = of_data(cfg, data, subject, Training(own or data))
    if cfg.n_questions and part.questions:
        part = first(part, cfg.n_questions)
    return part


def of_run(subject: Subject) -> Prepared | None:
    """The data that the subject's run was trained on, None for weights from elsewhere. Raises UserError (2) where it
    has gone."""
    data = subject.settings.get("data")
    if not isinstance(data, dict) or not data.get("fingerprint"):
        return None
    return prepared.with_fingerprint(paths.absolute(data["prepared_dir"]), data["fingerprint"])


def of_data(cfg: EvaluateConfig, data: Prepared, subject: Subject, training: Training) -> Part:
    """A split of prepared data."""
    split, settings = Split.open(data.folder, cfg.part), data.meta["settings"]
    source = f"{settings['name']}, {cfg.part} split"
    if not len(split.documents):
        has = ", ".join(name for name, own in data.meta["splits"].items() if own["documents"])
        raise UserError(f"the data has no {cfg.part} split", str(data.folder), f"it has {has}: set part=...")
    if settings["kind"] != "text":
        of_data = _questions(data, cfg.part)
        known = topics.read(data.folder, data.meta, cfg.part) or [("", "")] * len(of_data)
        own = subject.settings.get("data", {})
        mask = cfg.data.mask if cfg.data else own.get("mask", "response")
        template = subject.template or data.meta["template"]
        split = encoded(of_data, template, subject.tokens)
        return Part(source, split, mask, of_data, known, training, beside=Training(data))
    if data.meta["tokenizer"] != subject.tokens.name:
        texts = [data.tokens.decode(split.ids[a:b].tolist()) for a, _, b in split.documents]
        split = joined([(np.empty(0, subject.tokens.dtype), subject.tokens.ids(text)) for text in texts])
    return Part(source, split, "all", [], [], training)


def of_file(path: Path, subject: Subject, training: Training | None) -> Part:
    """A file of rows with questions and references, or else a text, which is one document."""
    if not path.is_file():
        raise UserError("no such file", str(path), paths.elsewhere(path) or "it takes a file of rows, or a text")
    if rows.format_of(path) is None:
        ids = subject.tokens.ids(text_files.read_text(path))
        if len(ids) < 2:
            raise UserError("the text is empty", str(path), "give at least two tokens")
        return Part(path.name, joined([(ids[:0], ids)]), "all", [], [], training)
    found, known = read_rows(path)
    if not found:
        raise UserError("no row", str(path), "give at least one question with its reference")
    split = encoded(found, subject.template or "plain", subject.tokens)
    return Part(path.name, split, "response", found, known, training)


def read_rows(path: Path) -> tuple[list[Question], list[tuple[str, str]]]:
    """The questions of a file, with focus and source. Raises UserError (2) for one without a question or reference."""
    bad = rows.BadRows("error", setting=None)
    found, known = [], []
    for row, values in rows.read_known(path, bad, "references"):
        cells = {name: "" if value is None else value for name, value in values.items()}
        if not all(isinstance(cell, str) for cell in cells.values()):
            bad.report(row.where, row.line, "questions and references must be texts")
        for name, what in (("instruction", "question"), ("output", "reference")):
            if not cells[name].strip():
                bad.report(row.where, row.line, f"the {what} is empty")
        found.append(Question(cells["instruction"], cells.get("input", ""), cells["output"]))
        known.append((cells.get("focus_area", ""), cells.get("source", "")))
    return found, known


def first(part: Part, n: int) -> Part:
    """The first questions only; val and test splits are in random order. Fewer than asked for is said."""
    if len(part.questions) < n:
        log.warning(f"n_questions={n:,}: {part.source} has {len(part.questions):,}, and all of them are scored")
        return part
    documents = part.split.documents[:n]
    split = Split(part.split.ids[: documents[-1, 2]], documents, part.split.name)
    return replace(part, split=split, questions=part.questions[:n], topics=part.topics[:n], whole=part)


def _questions(data: Prepared, split_name: str) -> list[Question]:
    """The questions of a split, from its token files: they are known by their fingerprint, JSON Lines are not."""
    tokens, split = data.tokens, Split.open(data.folder, split_name)
    found = []
    for start, response, end in split.documents.tolist():
        prompt = read_prompt(data.meta["template"], tokens.decode(split.ids[start:response].tolist()))
        found.append(Question(*prompt, tokens.decode(split.ids[response : end - 1].tolist())))  # without end of text
    return found


def encoded(questions: Sequence[Question], template: str, tokens: Tokenizer) -> Split:
    """Documents as training has them: prompt, response, end of text."""
    end = np.array([tokens.eos], dtype=tokens.dtype)
    prompts = [format_prompt(template, question.instruction, question.input) for question in questions]
    references = [question.reference or "" for question in questions]
    pairs = zip(tokens.ids_of_each(prompts), tokens.ids_of_each(references), strict=True)
    return joined([(prompt, np.concatenate([reference, end])) for prompt, reference in pairs])


def joined(documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> Split:
    """A split of documents, (prompt, response) each."""
    prompts, totals = ([len(p) for p, _ in documents], [len(p) + len(r) for p, r in documents])
    ends = np.cumsum(totals)
    starts = ends - totals
    ids = np.concatenate([part for document in documents for part in document])
    return Split(ids, np.stack([starts, starts + prompts, ends], axis=1).astype(np.int64), "evaluated")


def shown(part: Part) -> dict[str, Any]:
    """What results say of their questions."""
    n = len(part.questions) or len(part.split.documents)
    return {"source": escape(part.source), "documents": n, "sha256": part.sha256}
