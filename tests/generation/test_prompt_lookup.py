"""Guessed tokens change how many passes a text takes, and neither the text nor its distribution."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import UNPUBLISHED, model_config, modern_config
from scipy.stats import chisquare

from gpt import sampling
from gpt.config.families import model_class
from gpt.generation import precision
from gpt.generation.prompt_lookup import Lookup, read, stream, stream_of
from gpt.model import LanguageModel

CONTEXT, VOCABULARY = 24, 5
FAMILIES = {
    "gpt2": model_config(context_length=CONTEXT),
    "windows": modern_config(**UNPUBLISHED | {"context_length": CONTEXT}),
}
DRAWS = sampling.Draws(12, eos=None, temperature=1.0, top_k=None, top_p=None)
PROMPT = [0, 1, 2, 3, 0, 1, 2, 4, 0, 1]


def made(family: str) -> LanguageModel:
    """In float64, where rounding decides about no token; of five tokens, so that guesses are often right."""
    torch.manual_seed(3)
    config = FAMILIES[family]
    model = model_class(config.family)(config, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
        model.head.mul_(0.6)
    return model.double().eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> LanguageModel:
    return made(request.param)


def drawn(model: LanguageModel, n_drafted: int | None, seed: int = 0, stop=lambda: False, **changes) -> list[int]:
    cache = sampling.KVCache(CONTEXT)
    logits = sampling.read(model, PROMPT, cache)
    draws, generator = replace(DRAWS, **changes), sampling.sample_generator(seed, 0)
    return list(stream_of(n_drafted)(model, PROMPT, logits, cache, draws, generator, stop))


def passes(model: LanguageModel, work) -> int:
    """How often the model is run."""
    seen = []
    handle = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    work()
    handle.remove()
    return len(seen)


@pytest.mark.parametrize("n_drafted", [1, 4, 30])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.0}, {"top_k": 3, "temperature": 0.5}, {"top_p": 0.8}, {"eos": 4},
                {"max_new_tokens": 1}, {"max_new_tokens": 2 * CONTEXT}],
    ids=str,
)  # fmt: skip
def test_same_seed_same_text_with_and_without_guesses_within_and_past_the_context(model, n_drafted, changes):
    for seed in range(2):
        assert drawn(model, n_drafted, seed, **changes) == drawn(model, None, seed, **changes)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_weights_in_few_bits_round_up_to_seven_guesses_as_none(name):
    torch.manual_seed(0)
    config = model_config(n_embd=64, n_head=2, context_length=64)
    packed = precision.prepare(model_class(config.family)(config, VOCABULARY).eval(), name)
    cache, ids = sampling.KVCache(64), PROMPT * 4
    for n in range(1, 8):
        start, cache.length = len(ids) - n, 0
        sampling.read(packed, ids[: start - 1], cache)
        one_by_one = [sampling.read(packed, ids[:length], cache) for length in range(start, len(ids) + 1)]
        cache.length = start - 1
        with torch.inference_mode():
            assert torch.equal(read(packed, ids[:start], ids[start:], cache), torch.stack(one_by_one))


def test_a_text_that_repeats_itself_takes_a_fraction_of_the_passes():
    model = made("gpt2")
    with torch.no_grad():  # each token makes the next one in a circle likeliest, whatever came before it
        for block in model.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.wpe.weight.zero_()
        model.wte.weight.copy_(torch.eye(VOCABULARY, model.config.n_embd))
        model.lm_head = torch.nn.Linear(model.config.n_embd, VOCABULARY, bias=False).double()
        model.lm_head.weight.copy_(torch.eye(VOCABULARY, model.config.n_embd).roll(1, 0) * 50)
    without = passes(model, lambda: drawn(model, None))
    assert without == 12  # the prompt, and all new tokens but the last
    text = drawn(model, 4)
    assert all(after == (token + 1) % VOCABULARY for token, after in zip([1, *text], text, strict=False))
    assert passes(model, lambda: drawn(model, 4)) <= 5


def test_texts_are_as_frequent_as_the_model_has_them_probable():
    """Chi-square against the probabilities of all 125 texts of three tokens, each computed without a draft."""
    model, n, draws = made("gpt2"), 600, replace(DRAWS, max_new_tokens=3, temperature=1.6)
    with torch.inference_mode():
        texts = torch.tensor([[*PROMPT, *text] for text in product(range(VOCABULARY), repeat=3)])  # (125, T)
        after = draws.probabilities(model(texts)[:, len(PROMPT) - 1 : -1])  # (125, 3, V)
        wanted = n * after.gather(-1, texts[:, len(PROMPT) :, None]).prod(1)[:, 0]  # (125,)
    cache = sampling.KVCache(CONTEXT)
    logits = sampling.read(model, PROMPT, cache)
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(n):
        generator = sampling.sample_generator(seed, 0)
        seen[tuple(stream(model, PROMPT, logits, cache, draws, generator, n_drafted=3))] += 1
    counts = torch.tensor([seen[tuple(text[len(PROMPT) :].tolist())] for text in texts])
    likely = wanted >= 5  # cells that the test may be used for; the others are one more together
    found, expected = (torch.cat([t[likely], t[~likely].sum()[None]]) for t in (counts, wanted))
    assert likely.sum() > 20
    assert chisquare(found, expected).pvalue > 0.001
    # After a first token 0, 1 or 2 the draft is what followed it in the prompt: both taken and refused.
    taken = sum(count for text, count in seen.items() if text[:2] in {(0, 1), (1, 2), (2, 4)})
    drafted = sum(count for text, count in seen.items() if text[0] in (0, 1, 2))
    assert 0.05 < taken / drafted < 0.95


def test_it_stops_before_the_next_token_when_told_to(model):
    answers = iter([False] * 5 + [True])
    assert drawn(model, 3, stop=lambda: next(answers)) == drawn(model, None)[:5]


def test_the_cache_holds_the_tokens_that_were_drawn_and_no_guess_wherever_the_text_ends():
    model = made("gpt2")
    for n in range(1, CONTEXT - len(PROMPT)):
        caches = []
        for n_drafted in (None, 4):
            caches.append(cache := sampling.KVCache(CONTEXT))
            logits = sampling.read(model, PROMPT, cache)
            draws, generator = replace(DRAWS, max_new_tokens=n), sampling.sample_generator(5, 0)
            assert len(list(stream_of(n_drafted)(model, PROMPT, logits, cache, draws, generator))) == n
        length = len(PROMPT) + n - 1
        assert [cache.length for cache in caches] == [length, length]
        for one, other in zip(caches[0].layers[1], caches[1].layers[1], strict=True):
            torch.testing.assert_close(one[:, :, :length], other[:, :, :length])


def test_a_cache_that_holds_another_text_beyond_the_prompt_may_be_used_again(model):
    cache = sampling.KVCache(CONTEXT)
    logits = sampling.read(model, PROMPT, cache)
    generators = [sampling.sample_generator(seed, 0) for seed in (0, 1, 0)]
    texts = [list(stream(model, PROMPT, logits, cache, DRAWS, own, n_drafted=4)) for own in generators]
    assert texts[0] == texts[2] != texts[1]


class TestDrafts:
    def test_they_are_what_followed_the_longest_sequence(self):
        assert Lookup([1, 2, 3, 7, 7, 2, 3, 8, 9, 1, 2, 3]).draft(2) == [7, 7]

    def test_of_several_occurrences_the_last_one_counts(self):
        assert Lookup([1, 2, 5, 1, 2, 6, 1, 2]).draft(2) == [6, 1]

    def test_shorter_sequences_are_looked_for_where_longer_ones_are_not_found(self):
        assert Lookup([4, 9, 3, 4]).draft(3) == [9, 3, 4]

    def test_what_comes_to_the_end_is_repeated(self):
        assert Lookup([5, 6, 5, 6]).draft(5) == [5, 6, 5, 6, 5]

    def test_nothing_is_guessed_where_nothing_was_there_before(self):
        assert Lookup([1, 2, 3]).draft(4) == Lookup([]).draft(4) == []
