"""Generates text: draws the next token from logits, continues a prompt, and caches keys and values.

Letters in shape comments are those of gpt/model.py: B rows, T tokens, V vocabulary, H heads, D width of a head.

Same seed, same text: a sample of `generate` depends on the model, the prompt, the settings, the seed and its own
number, and not on how many samples or prompts there are. To keep that exact, samples are computed one after the other;
gpt/generation/continuation.py computes many together, several times as fast.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config.schema import GenerateConfig, SampleConfig, TrainConfig
from gpt.errors import NUMERICAL, UserError
from gpt.model import LanguageModel
from gpt.prompts import Question, format_prompt

log = logging.getLogger(__name__)

FEW_QUERIES = 8  # tokens whose attention is computed in float32 where keys and values are bfloat16: as one alone
PIECE = 64  # tokens of the vocabulary whose largest logit is looked for first
MANY = 256, 8192  # tokens that hold the nucleus of most distributions of a language, and of nearly all

_warned: WeakSet[nn.Module] = WeakSet()  # models whose cut prompts have been said: once for each job of a sweep


@dataclass(frozen=True)
class Draws:
    """How a text is drawn: at most `max_new_tokens`, which `eos` ends earlier (None: no token does), each with the
    `probabilities` of these values."""

    max_new_tokens: int
    eos: int | None
    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(cls, cfg: GenerateConfig | SampleConfig, eos: int | None) -> Self:
        return cls(cfg.max_new_tokens, eos, cfg.temperature, cfg.top_k, cfg.top_p)

    def probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.temperature, self.top_k, self.top_p)


def largest(logits: Tensor, k: int) -> Tensor:
    """Ids, in their order, of the k largest of (V,) logits; equals of the k-th largest are all among them (Fan et al.,
    2018).

    Only those pieces of the vocabulary are looked into whose largest logit is among the k largest of all pieces.
    """
    if k >= len(logits):
        return torch.arange(len(logits), device=logits.device)
    pieces = F.pad(logits, (0, -len(logits) % PIECE), value=-torch.inf).view(-1, PIECE)
    maxima = pieces.amax(1)
    where = (maxima >= maxima.topk(min(k, len(maxima))).values[-1]).nonzero()  # (n, 1) numbers of pieces
    inside = pieces[where[:, 0]]  # (n, PIECE)
    piece, place = (inside >= inside.flatten().topk(k).values[-1]).nonzero(as_tuple=True)
    return where[piece, 0] * PIECE + place


def nucleus(chances: Tensor, p: float, ids: Tensor | None = None) -> Tensor:
    """Ids of the fewest of (V,) probabilities whose sum reaches p, at least one; of equal ones the lower ids (Holtzman
    et al., 2020). `ids`: those that can be among them, in their order; they are looked for where it is None."""
    if ids is None:  # rarely must the whole vocabulary be sorted
        for many in MANY:
            likely = largest(chances, many)
            found = nucleus(chances, p, likely)
            if len(found) < len(likely):
                return found
        ids = torch.arange(len(chances), device=chances.device)
    ordered, order = chances[ids].sort(descending=True, stable=True)
    is_in = ordered.cumsum(0) - ordered < p  # the tokens before this one have not reached p
    is_in[:1] = True
    return ids[order[is_in]]


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """(..., V) logits -> (..., V) float64 probabilities of the next token: top-k, then temperature, then top-p.

    Temperature 0 is its limit, all on the largest logit; on the lowest id if there are several.
    """
    if temperature == 0:
        zeros = torch.zeros_like(logits, dtype=torch.float64)
        return zeros.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if logits.dim() > 1:
        return torch.stack([probabilities(row, temperature, top_k, top_p) for row in logits])
    ids = None if top_k is None else largest(logits, top_k)
    kept = (logits if ids is None else logits[ids]).double()
    kept = only(ids, (kept - kept.amax()) / temperature, len(logits))  # at most 0: no temperature can overflow it
    chances = kept.softmax(-1)
    if top_p is None or top_p >= 1:  # at 1, what rounding leaves of the sum must not cut the tail
        return chances
    ids = nucleus(chances, top_p, ids)
    return only(ids, kept[ids], len(logits)).softmax(-1)


def only(ids: Tensor | None, logits: Tensor, n_vocab: int) -> Tensor:
    """(V,) logits that are -inf but for some ids, whose logits these are; None: for all ids."""
    return logits if ids is None else logits.new_full((n_vocab,), -torch.inf).index_copy_(0, ids, logits)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token id, drawn from (V,) probabilities by inverting their cumulative sum at one uniform number."""
    cumulative = probabilities.cumsum(0)  # (V,)
    uniform = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, uniform, right=True))  # right: never a token of probability 0


def sample_generator(seed: int, sample: int) -> torch.Generator:
    """The random numbers of one sample. Seed 0's sample 1 shares nothing with seed 1's sample 0."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, sample]).generate_state(1)[0]))


class KVCache:
    """The keys and values of all tokens so far: gpt.model.Cache. Setting `length` back forgets the later ones.

    Each layer's tensors are allocated at its first keys, whose shape gives the number of heads and their width, and
    whose type is that in which they are held.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, each (B, H, context_length, D)
        self.length = 0  # tokens held; raised by the caller once all layers have written theirs

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            B, H, _, D = keys.shape
            shape = B, H, self.context_length, D
            self.layers[layer] = keys.new_empty(shape), values.new_empty(shape)
        T = keys.shape[2]
        all_keys, all_values = self.layers[layer]
        all_keys.narrow(2, self.length, T).copy_(keys)
        all_values.narrow(2, self.length, T).copy_(values)
        held = self.length + T
        return for_attention(all_keys.narrow(2, 0, held), all_values.narrow(2, 0, held), T)


def for_attention(keys: Tensor, values: Tensor, n_queries: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each (B, H, S, D), of the type that so many tokens attend to: a few round as one alone does.
    Attention of one token to 256 others in float32 took a quarter of the time of bfloat16 on a CPU, making them
    included, and four times as long on one with AVX512-BF16."""
    if keys.dtype == torch.bfloat16 and n_queries <= FEW_QUERIES and keys.device.type == "cpu":
        return keys.float(), values.float()
    return keys, values


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turns dropout and compiled blocks off inside; afterwards every submodule is in its former mode, also on errors.

    Blocks compiled for training would be compiled again for the shapes of sampling, which takes half a minute.
    """
    is_loaded = "torch._dynamo" in sys.modules  # if not, nothing is compiled, and loading it would take a second
    eager = torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with eager:
            yield
    finally:
        for module, training in modes:
            module.training = training


def next_logits(model: LanguageModel, ids: list[int], cache: KVCache | None) -> Tensor:
    """(V,) logits of the token after `ids`, float32 on the CPU, so that the draw is the same on all devices.

    Runs the model on the tokens that the cache does not hold. Beyond the context length the model sees only the last
    tokens; each is then at another position than before, so the cache is not used.
    """
    context_length = model.config.context_length
    if cache is None or len(ids) > context_length:
        cache, unseen = None, ids[-context_length:]
    else:
        unseen = ids[cache.length :]
    logits = model(torch.tensor([unseen], device=model.head.device), cache=cache, where=-1)  # (1, V)
    if cache is not None:
        cache.length = len(ids)
    return checked(logits)[0]


def checked(logits: Tensor) -> Tensor:
    """Logits in float32 on the CPU. Raises UserError (4) where they are not finite."""
    logits = logits.float().cpu()
    if not torch.stack(logits.aminmax()).isfinite().all():  # NaN is both the least and the largest
        raise not_finite("logits")
    return logits


def not_finite(what: str) -> UserError:
    """The error for a model that computes infinities or NaN."""
    return UserError(f"the model's {what} are not finite", remedy="use an earlier checkpoint", code=NUMERICAL)


def fit_prompt(prompt_ids: list[int], context_length: int, max_new_tokens: int) -> list[int]:
    """The end of a prompt that leaves room in the context for the new tokens, but never less than half of it."""
    return prompt_ids[-max(context_length - max_new_tokens, context_length // 2, 1) :]


def checked_prompt(prompt_ids: list[int], context_length: int, max_new_tokens: int) -> list[int]:
    """A prompt that can be gone on from: one longer than the context keeps its end, with a warning. Raises UserError
    for an empty one, or max_new_tokens below 1."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompt_ids:
        raise UserError("the prompt is empty", remedy="give at least one token to go on from")
    if len(prompt_ids) <= context_length:
        return prompt_ids
    kept = fit_prompt(prompt_ids, context_length, max_new_tokens)
    log.warning(
        "the prompt has %d tokens, the context %d: only its last %d are used",
        len(prompt_ids), context_length, len(kept),
    )  # fmt: skip
    return kept


@torch.inference_mode()
def read(model: LanguageModel, ids: list[int], cache: KVCache | None) -> Tensor:
    """(V,) logits after `ids`, of which the cache holds the first `cache.length` already, and then all."""
    with eval_mode(model):
        return next_logits(model, ids, cache)


@torch.inference_mode()  # of a generator: while it runs, and not while its caller does
def stream(
    model: LanguageModel,
    ids: list[int],
    logits: Tensor,
    cache: KVCache | None,
    draws: Draws,
    generator: torch.Generator,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yields the new ids after `ids`, each as soon as it is drawn, without `draws.eos`, which ends them.

    logits: (V,) those that `read` gives of `ids`, all of which the cache holds; what it holds beyond them, such as
    another sample, is forgotten. `stop` is called before every token; once it returns true, there are no more. The last
    token is drawn and not read: the cache does not hold it.
    """
    ids = list(ids)
    if cache is not None:
        cache.length = len(ids)
    with eval_mode(model):
        for number in range(1, draws.max_new_tokens + 1):
            if stop():
                return
            token = draw(draws.probabilities(logits), generator)
            if token == draws.eos:
                return
            yield token
            if number < draws.max_new_tokens:
                ids.append(token)
                logits = next_logits(model, ids, cache)


def generate(
    model: LanguageModel,
    prompt_ids: list[int],
    draws: Draws,
    *,
    num_samples: int,
    seed: int,
    use_cache: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The new ids of each sample, without the prompt and without `draws.eos`, which ends a sample.

    A prompt longer than the context keeps its end, with a warning. `stop` is called before every token; once it returns
    true, the ids so far are returned. Raises UserError for an empty prompt or max_new_tokens below 1.
    """
    prompt_ids = checked_prompt(prompt_ids, model.config.context_length, draws.max_new_tokens)
    cache = KVCache(model.config.context_length) if use_cache else None
    after_prompt = read(model, prompt_ids, cache)
    return [
        list(stream(model, prompt_ids, after_prompt, cache, draws, sample_generator(seed, number), stop))
        for number in range(num_samples)
    ]


def preview(
    model: LanguageModel,
    tokenizer: Any,
    questions: list[Question],
    template: str | None,
    cfg: TrainConfig,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, str]]:
    """One {"prompt", "text"} per question, with its "reference" if it has one, to watch a model learn.

    template None: the prompt is used as it is. A prompt that leaves no room for an answer loses its beginning, which
    is said once. `stop`: as in `generate`.
    """
    previews, n_cut, draws = [], 0, Draws.of(cfg.sample, tokenizer.eos)
    for question in questions:
        prompt = question.instruction
        ids = tokenizer.encode(format_prompt(template, prompt, question.input))
        kept = fit_prompt(ids, model.config.context_length, draws.max_new_tokens)
        n_cut += len(kept) < len(ids)
        [new] = generate(model, kept, draws, num_samples=1, seed=cfg.seed, stop=stop)
        reference = {} if question.reference is None else {"reference": question.reference}
        previews.append({"prompt": prompt, "text": tokenizer.decode(new), **reference})
    if n_cut and model not in _warned:
        _warned.add(model)
        room = f"the context of {model.config.context_length} tokens with {draws.max_new_tokens} new ones"
        many = f"{n_cut} of {len(questions)} prompts of the samples"
        log.warning(f"{many} lose their beginning: no room in {room}")
    return previews
