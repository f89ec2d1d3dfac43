"""Puts together what an evaluation works on: a model and what it is asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gpt.evaluation.questions import Part
from gpt.evaluation.subject import Subject
from gpt.files.paths import PROJECT_ROOT
from gpt.model import LanguageModel
from gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """A model, and what it is asked. `batch_size`: rows that are computed together; `open_part` opens the questions,
    which not every kind needs."""

    subject: Subject
    open_part: Callable[[], Part]
    batch_size: int
    seed: int
    device: torch.device
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> LanguageModel:
        return self.subject.model

    @property
    def tokens(self) -> Tokenizer:
        return self.subject.tokens

    @property
    def part(self) -> Part:
        """The questions. Raises UserError where there are none."""
        return self.cached("part", self.open_part)

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed once."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def before_training(self) -> LanguageModel | None:
        """The model that the run began with, where that was one. Raises UserError where it has gone."""
        from gpt.weights import loading

        name = self.subject.origin
        if name is None:
            return None
        return self.cached("before", lambda: loading.load(name, PROJECT_ROOT, self.device).model)
