"""Guesses the next tokens from what followed the same ones before, and checks all guesses in one pass of the model.

Prompt lookup (Saxena, 2023): where the last tokens stand earlier in the prompt or the text, what came after them there
is the draft. A pass over some tokens needs the weights once, as one over a single token does, and the weights are what
takes the time. It pays where a text repeats its prompt or itself.

The text is the one that is drawn without drafts. Each token is drawn from the model's own probabilities p with the next
random number, and a draft is taken as long as it is what was drawn. That is the rejection rule of speculative sampling
(Leviathan et al., 2023) for a draft t that is certain: t is accepted with probability p(t), and else the token is
distributed as p without t; and it needs no more random numbers than there are tokens, so the same seed gives the same
text. Only rounding is another with more tokens in a pass (3e-6 of a logit), so that now and then a token differs. In
int8 and int4 it is the same with up to 7 guesses; with more, and in bfloat16, it is that of bfloat16 (0.06 of a logit),
and another token comes soon.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpt import sampling
from gpt.model import LanguageModel
from gpt.sampling import Draws, KVCache

LONGEST = 3  # tokens that have to be the same; where no three are, two or one


class Lookup:
    """The tokens of a prompt and a text so far, and where each sequence of up to LONGEST of them was last followed."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self.following: dict[tuple[int, ...], int] = {}  # sequence -> the place of the token after its last occurrence
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Adds the next token, which is what follows the sequences at the end."""
        for n in range(1, min(LONGEST, len(self.ids)) + 1):
            self.following[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def draft(self, n: int) -> list[int]:
        """What followed the longest sequence at the end that was there before, up to `n` tokens, repeated if it
        comes to the end; none where nothing was there before."""
        for length in range(min(LONGEST, len(self.ids)), 0, -1):
            start = self.following.get(tuple(self.ids[-length:]))
            if start is not None:
                before = self.ids[start : start + n]
                return [before[i % len(before)] for i in range(n)]
        return []


@torch.inference_mode()  # of a generator: while it runs, and not while its caller does
def stream(
    model: LanguageModel,
    ids: list[int],
    logits: Tensor,
    cache: KVCache,
    draws: Draws,
    generator: torch.Generator,
    stop: Callable[[], bool] = lambda: False,
    *,
    n_drafted: int,
) -> Iterator[int]:
    """As sampling.stream, with up to `n_drafted` tokens checked in a pass; the cache never holds more than it would."""
    cache.length, n_new = len(ids), 0
    lookup, draft, logits = Lookup(ids), [], logits[None]  # (1, V)
    with sampling.eval_mode(model):
        while True:
            held = cache.length
            for after, guess in zip(logits, [*draft, None], strict=True):
                cache.length = min(held, len(lookup.ids))  # without guesses that are not drawn
                if stop():
                    return
                token = sampling.draw(draws.probabilities(after), generator)
                if token == draws.eos:
                    return
                yield token
                n_new += 1
                if n_new == draws.max_new_tokens:
                    return
                lookup.append(token)
                if token != guess:
                    break  # all logits after this one are those of another text
            room = min(draws.max_new_tokens - n_new, model.config.context_length - len(lookup.ids))
            draft = lookup.draft(min(n_drafted, room)) if room > 0 else []
            logits = read(model, lookup.ids, draft, cache)  # (drafted + 1, V)


def read(model: LanguageModel, ids: list[int], draft: list[int], cache: KVCache) -> Tensor:
    """(drafted + 1, V) logits after `ids`, of which the cache holds all but the last, and after each token of
    `draft`."""
    if not draft:
        return sampling.next_logits(model, ids, cache)[None]
    tokens = torch.tensor([[ids[-1], *draft]], device=model.head.device)
    logits = model(tokens, cache=cache)[0]
    cache.length = len(ids) + len(draft)
    return sampling.checked(logits)


def stream_of(lookup: int | None) -> Callable[..., Iterator[int]]:
    """The function that generates: sampling.stream, or this one with so many tokens drafted."""
    return sampling.stream if lookup is None else partial(stream, n_drafted=lookup)
