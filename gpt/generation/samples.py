"""Computes the samples of prompts one after the other, and prints them as they come."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

from gpt import sampling
from gpt.config.schema import GenerateConfig
from gpt.errors import Interrupted
from gpt.generation import prompt_lookup, text_stream
from gpt.generation.meter import Meter
from gpt.model import LanguageModel
from gpt.prompts import format_prompt
from gpt.runs import interrupt
from gpt.terminal.answers import announce_prompt, announce_sample, remark, show
from gpt.tokenizer import Tokenizer


def write(
    cfg: GenerateConfig, prompts: list[tuple[str, str]], template: str | None, model: LanguageModel, tokens: Tokenizer
) -> None:
    """Prints each (instruction, input) to stderr and its samples to stdout. On a terminal they appear as they are made,
    and Ctrl-C ends the one that is being made; in a pipe, or where it is the last one, the process ends."""
    context_length, last = model.config.context_length, len(prompts) * cfg.num_samples - 1
    cache, ctrl_c = sampling.KVCache(context_length), interrupt.AnswerEnd()
    meter, draws = Meter(model, cache), sampling.Draws.of(cfg, tokens.eos)

    def wanted() -> Iterator[tuple[list[int], int]]:
        for instruction, given in prompts:
            announce_prompt(instruction, given)
            ids = tokens.encode(format_prompt(template, instruction, given))
            ids = sampling.checked_prompt(ids, context_length, cfg.max_new_tokens)
            meter.start()
            for sample in range(cfg.num_samples):
                yield ids, sample

    with ctrl_c if sys.stdout.isatty() else nullcontext():
        for number, new in enumerate(one_by_one(model, wanted(), cache, draws, cfg.seed, cfg.lookup, ctrl_c)):
            announce_sample(number % cfg.num_samples + 1, cfg.num_samples)
            show(text_stream.pieces(meter.watch(new), tokens.decode, cfg.stop), "\n" if number else "")
            if number < last:
                ctrl_c.reset()
    if ctrl_c():
        raise Interrupted(signal.SIGINT)
    if cfg.stats:
        remark(f"statistics: {meter.line()}")


def one_by_one(
    model: LanguageModel, wanted: Iterable[tuple[list[int], int]], cache: sampling.KVCache, draws: sampling.Draws,
    seed: int, lookup: int | None, stop: Callable[[], bool],
) -> Iterator[Iterator[int]]:  # fmt: skip
    """Yields for each (prompt, number of the sample) its new ids, as sampling.generate draws them, each as soon as it
    is drawn. A prompt is read once for all of its samples that follow each other, which are the same list."""
    read: list[int] | None = None
    for prompt, sample in wanted:
        if prompt is not read:
            cache.length, read = 0, prompt
            logits = sampling.read(model, prompt, cache)
        generator = sampling.sample_generator(seed, sample)
        yield prompt_lookup.stream_of(lookup)(model, prompt, logits, cache, draws, generator, stop)
