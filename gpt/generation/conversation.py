"""Holds a conversation: its turns, what the model reads of them, and the keys and values of what it has read.

In a template the first turn is the prompt that generate.py makes of it, and later ones follow as further blocks of
instruction and response (gpt/prompts.py). No end of text stands between turns: what these models have learned to do
after one is to begin anew. Without a template all turns are one text, which the model goes on with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpt import sampling
from gpt.config.schema import GenerateConfig
from gpt.generation import prompt_lookup, text_stream
from gpt.generation.meter import Meter
from gpt.model import LanguageModel
from gpt.prompts import end_of_response, format_turn
from gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """What a person wrote, and what the model answered: its ids, and the text of these."""

    written: str
    ids: list[int]
    text: str


class Conversation:
    """The turns of one person and one model.

    Turn n is drawn with the random numbers of sample n of the seed: the same conversation has the same answers, and a
    first turn has the answer that generate.py gives to it as a prompt.
    """

    def __init__(self, model: LanguageModel, tokens: Tokenizer, template: str | None, cfg: GenerateConfig) -> None:
        self.model, self.tokens, self.template, self.cfg = model, tokens, template, cfg
        self.temperature = cfg.temperature
        self.system = ""  # stands in the place of the template's header, unless it is empty
        self.turns: list[Turn] = []
        self.n_left = 0  # turns that the model does not read any more, the oldest ones
        self.cache = sampling.KVCache(model.config.context_length)
        self.meter = Meter(model, self.cache)  # of the last answer
        self._read: list[int] = []  # ids, of which the cache holds the first cache.length
        self._stop = [*cfg.stop, *filter(None, [template and end_of_response(template)])]

    def reset(self) -> None:
        """Forgets all turns, but neither `system` nor `temperature`."""
        self.turns, self.n_left = [], 0

    def make_room(self, written: str) -> int:
        """Leaves out the oldest turns, so that those that stay, `written` and an answer of max_new_tokens fit into the
        context, or at least half of it is left for an answer. Returns how many turns leave, or without a template,
        where all is one text, how many tokens of its beginning do."""
        if self.template is None:
            return self._excess(written)
        before = self.n_left
        while self.n_left < len(self.turns) and self._excess(written):
            self.n_left += 1
        return self.n_left - before

    def answer(self, written: str, is_ended: Callable[[], bool]) -> Iterator[str]:
        """Yields the model's answer in pieces of text, then adds the turn; after `make_room`. It ends where the model
        ends it, before a stop string, after max_new_tokens, or once `is_ended`, which is asked before every token.

        What the cache holds of the turns before is not computed again. Raises UserError (2) where there is nothing to
        go on from, and (4) for numbers that are not finite; then no turn is added."""
        cfg, context_length = self.cfg, self.model.config.context_length
        self.meter = Meter(self.model, self.cache)
        prompt = self.ids(written)
        if self.template is None:
            prompt = sampling.fit_prompt(prompt, context_length, cfg.max_new_tokens)
        prompt = sampling.checked_prompt(prompt, context_length, cfg.max_new_tokens)
        held = self._read[: self.cache.length]
        self.cache.length = min(n_common(held, prompt), len(prompt) - 1)  # the logits after the last one are needed
        self._read = prompt[:]
        self.meter.start()
        logits = sampling.read(self.model, prompt, self.cache)
        draws = replace(sampling.Draws.of(cfg, self.tokens.eos), temperature=self.temperature)
        generator = sampling.sample_generator(cfg.seed, len(self.turns))
        stream = prompt_lookup.stream_of(cfg.lookup)
        new = stream(self.model, prompt, logits, self.cache, draws, generator, is_ended)
        text = ""
        for piece in text_stream.pieces(self._noted(self.meter.watch(new)), self.tokens.decode, self._stop):
            text += piece
            yield piece
        ids = self._read[len(prompt) :]
        ids = ids if self.tokens.decode(ids) == text else self.tokens.encode(text)  # without the stop string
        self.turns.append(Turn(written, ids, text))

    def ids(self, written: str) -> list[int]:
        """What the model reads before it answers: the turns so far that it still reads, then this one."""
        ids: list[int] = []
        before = ""
        for turn in self.turns[self.n_left :]:
            ids += self._encode(turn.written, before, is_first=not ids) + turn.ids
            before = turn.text
        return ids + self._encode(written, before, is_first=not ids)

    def is_full(self) -> bool:
        """Whether the last answer went beyond the context: then its end was written without the beginning."""
        return len(self._read) > self.model.config.context_length + 1  # the last token has not been read

    def record(self) -> dict[str, Any]:
        """All turns since the beginning as a row of data: messages as OpenAI writes a chat, or one text."""
        if self.template is None:
            text = ""
            for turn in self.turns:
                text += gap(text, turn.written) + turn.written + turn.text
            return {"text": text}
        given = f"\n{self.cfg.input}" if self.cfg.input else ""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.written + given})
            messages.append({"role": "assistant", "content": turn.text})
        return {"messages": messages}

    def _excess(self, written: str) -> int:
        ids = self.ids(written)
        return len(ids) - len(sampling.fit_prompt(ids, self.model.config.context_length, self.cfg.max_new_tokens))

    def _encode(self, written: str, before: str, is_first: bool) -> list[int]:
        if self.template is None:
            return self.tokens.encode(gap(before, written) + written)
        return self.tokens.encode(format_turn(self.template, written, self.cfg.input, self.system, is_first))

    def _noted(self, new: Iterator[int]) -> Iterator[int]:
        for token in new:
            self._read.append(token)
            yield token


def gap(before: str, written: str) -> str:
    """What stands between two parts of one text: a space, where two words would become one."""
    return " " if before and not before[-1].isspace() and written[:1].isalnum() else ""


def n_common(a: list[int], b: list[int]) -> int:
    """How many ids are the same at the beginning of both."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
