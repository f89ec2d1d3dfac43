"""Makes the batches of the next step while the present one computes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from gpt.data.batching import Batch


class ReadAhead:
    """The batches of one step at a time, made ahead of time when that step has been foretold.

    `make` is a pure function of the step, so that reading ahead is a cache and nothing more: any step can be asked for
    at any time, and gives the same batches. One step ahead is enough, since making batches takes a small part of the
    time of a step. No thread lives longer than the block that foretells its step.
    """

    def __init__(self, make: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.make, self.device = make, device
        self._ahead: tuple[int, Future] | None = None

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a step. What went wrong in making them, in whatever thread, is raised here."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == number:
            return ahead[1].result()
        return self._ready(number)

    @contextmanager
    def preparing(self, number: int | None) -> Iterator[None]:
        """While the block runs, a thread makes the batches of step `number`; the block ends when both have."""
        if number is None:
            yield
            return
        with ThreadPoolExecutor(1, f"batches of step {number}") as thread:
            self._ahead = number, thread.submit(self._ready, number)
            yield

    def _ready(self, number: int) -> list[Batch]:
        """In page-locked memory for a GPU: a copy from anywhere else would wait for the GPU, see Batch.to."""
        batches = self.make(number)
        return [batch.pinned() for batch in batches] if self.device.type == "cuda" else batches
