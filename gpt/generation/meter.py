"""Measures how fast a model generates: tokens per second, the time to the first one, and the share of the bandwidth,
which is the limit as long as one text is generated at a time: each token needs all weights once.

The bandwidth is that with which the machine reads as many bytes as a token needs, over and over. Those of a small model
stay in the processor's caches, which are several times as fast as the memory.
"""

import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

from gpt.machine import rates
from gpt.model import LanguageModel
from gpt.sampling import KVCache


class Meter:
    """Counts tokens, seconds and bytes while a model generates. Time that the caller takes between two tokens, such as
    to print them, is none of them."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self.n_tokens = 0  # without the first of each text, which comes from the pass over the prompt
        self.seconds = 0.0  # that these took
        self.bytes = 0  # that were read for them, of weights and of the cache
        self.first: list[float] = []  # seconds from `start` to the first token
        self._device = model.head.device
        self._weights, self._cache = bytes_of_weights(model), cache
        self._started: float | None = None

    def start(self) -> None:
        """Says that a prompt is about to be read."""
        self._started = time.perf_counter()

    def watch(self, ids: Iterator[int]) -> Iterator[int]:
        """The same ids."""
        started = time.perf_counter()
        for number, token in enumerate(ids):
            ended = time.perf_counter()
            if number:
                self.n_tokens += 1
                self.seconds += ended - started
                self.bytes += self._weights + bytes_of_cache(self._cache)
            elif self._started is not None:
                self.first.append(ended - self._started)
                self._started = None
            yield token
            started = time.perf_counter()

    def line(self) -> str:
        """What has been counted, in one line; measures the bandwidth for a part of a second."""
        if not self.first:
            return "no token has been generated"
        several = f" (median of {len(self.first)} prompts)" if len(self.first) > 1 else ""
        first = f"{1000 * statistics.median(self.first):,.0f} ms to the first token{several}"
        if not self.n_tokens:
            return f"{first}; one token is too few for more"
        peak = rates.read_rate(self._device, self.bytes // self.n_tokens)
        rate = self.bytes / self.seconds
        read = f"{rate / 1e9:.1f} GB/s of weights and cache read, {rate / peak:.0%} of the bandwidth"
        return f"{self.n_tokens / self.seconds:.1f} tokens/s, {first}, {read} of {peak / 1e9:.1f} GB/s"


def bytes_of_weights(model: LanguageModel) -> int:
    """Bytes of all weights that a token needs, as they are stored: all but the embeddings, of which it needs a row."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if model.packed_head is None:
        embeddings -= {id(model.head)}
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in embeddings)


def bytes_of_cache(cache: KVCache) -> int:
    """Bytes of the keys and values that the cache holds; a window, which needs fewer of them, does not count."""
    tensors: list[torch.Tensor] = [tensor for pair in cache.layers.values() for tensor in pair]  # (B, H, S, D) each
    return sum(tensor.nbytes // tensor.shape[2] for tensor in tensors) * cache.length
