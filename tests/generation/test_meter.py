"""Tokens per second, the time to the first one, and the bytes that were read for them."""

import re

import pytest
import torch
from conftest import UNPUBLISHED, model_config, modern_config

from gpt.generation import meter, precision
from gpt.generation.meter import Meter, bytes_of_cache, bytes_of_weights
from gpt.model import GPT
from gpt.modern import Modern
from gpt.sampling import KVCache

GPT2_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}


def test_a_token_of_gpt2_small_needs_494_6_mb_of_weights_and_at_1024_tokens_75_5_mb_of_keys_and_values():
    """The figures of float32: blocks 12 (12 d^2 + 13 d), the head V d, the last norm 2 d; 2 x 12 x 1,024 d of cache."""
    d = 768
    with torch.device("meta"):
        model = GPT(model_config(**GPT2_SMALL), 50257)
    assert bytes_of_weights(model) == 4 * (12 * (12 * d * d + 13 * d) + 50257 * d + 2 * d)
    assert round(bytes_of_weights(model) / 1e6, 1) == 494.6
    cache = KVCache(1024)
    for layer in range(12):
        cache.extend(layer, *[torch.empty(1, 12, 1, 64, device="meta")] * 2)
    cache.length = 1024
    assert bytes_of_cache(cache) == 2 * 12 * 1024 * d * 4
    assert round(bytes_of_cache(cache) / 1e6, 1) == 75.5


@pytest.mark.parametrize("tied", [True, False])
def test_of_embeddings_only_a_head_that_is_one_is_read_whole(tied):
    gpt2 = GPT(model_config(tie_weights=tied), 100)
    modern = Modern(modern_config(tie_weights=tied, **UNPUBLISHED), 100)
    outside = sum(parameter.nbytes for model in (gpt2, modern) for parameter in model.blocks.parameters())
    outside += sum(p.nbytes for part in (gpt2.ln_f, modern.copying) for p in part.parameters())
    assert bytes_of_weights(gpt2) + bytes_of_weights(modern) == outside + gpt2.head.nbytes + modern.head.nbytes


def test_weights_count_as_they_are_stored():
    model = GPT(model_config(), 100)
    assert bytes_of_weights(model.to(torch.bfloat16)) == bytes_of_weights(GPT(model_config(), 100)) / 2


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model_in_bfloat16_its_packed_head_is_read_once_and_no_table(tied):
    model = GPT(model_config(tie_weights=tied), 100)
    norms = sum(p.nbytes for name, p in model.named_parameters() if "ln_" in name)
    plain = bytes_of_weights(model)
    assert bytes_of_weights(precision.prepare(model, "bfloat16")) == (plain - norms) / 2 + norms


class Clock:
    """A clock that goes on only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_is_that_of_the_model_and_not_of_whoever_prints(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter.time, "perf_counter", clock)
    # Of as many bytes as a token needs, of which those of a small model stay in the caches.
    monkeypatch.setattr(meter.rates, "duration", lambda work, device: counted.bytes / counted.n_tokens / 20e9)
    model, cache = GPT(model_config(), 100), KVCache(16)
    cache.extend(0, *[torch.zeros(1, 2, 1, 8)] * 2)

    def drawn(n: int):
        for token in range(n):
            cache.length = 10 + token
            clock.now += 0.25 if token else 1.0
            yield token

    counted = Meter(model, cache)
    for _ in range(2):
        clock.now += 100
        counted.start()
        clock.now += 3  # the prompt is read
        for _ in range(2):  # samples; only the first one waits for that
            for _ in counted.watch(drawn(5)):
                clock.now += 10
    assert counted.first == [4.0, 4.0]
    assert (counted.n_tokens, counted.seconds) == (16, 4.0)
    assert counted.bytes == 4 * sum(bytes_of_weights(model) + 2 * 16 * 4 * length for length in (11, 12, 13, 14))
    read = counted.bytes / 4.0
    assert counted.line() == (
        f"4.0 tokens/s, 4,000 ms to the first token (median of 2 prompts), {read / 1e9:.1f} GB/s of weights and cache "
        f"read, {read / 20e9:.0%} of the bandwidth of 20.0 GB/s"
    )


def test_too_few_tokens_are_said_to_be_too_few():
    counted = Meter(GPT(model_config(), 100), KVCache(16))
    counted.start()
    assert list(counted.watch(iter([]))) == [] and counted.line() == "no token has been generated"
    assert list(counted.watch(iter([3]))) == [3]
    assert re.fullmatch(r"\d+ ms to the first token; one token is too few for more", counted.line())
