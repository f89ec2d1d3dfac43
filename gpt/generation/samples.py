"""Prints the samples of prompts, one after the other."""

import signal
import sys
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
    context_length, left = model.config.context_length, len(prompts) * cfg.num_samples
    cache, ctrl_c = sampling.KVCache(context_length), interrupt.AnswerEnd()
    meter = Meter(model, cache)
    first = ""
    with ctrl_c if sys.stdout.isatty() else nullcontext():
        for instruction, given in prompts:
            announce_prompt(instruction, given)
            ids = tokens.encode(format_prompt(template, instruction, given))
            ids = sampling.checked_prompt(ids, context_length, cfg.max_new_tokens)
            cache.length = 0
            meter.start()
            logits = sampling.read(model, ids, cache)
            for number in range(cfg.num_samples):
                announce_sample(number + 1, cfg.num_samples)
                new = prompt_lookup.stream_of(cfg.lookup)(
                    model, ids, logits, cache,
                    max_new_tokens=cfg.max_new_tokens, eos=tokens.eos, temperature=cfg.temperature, top_k=cfg.top_k,
                    top_p=cfg.top_p, generator=sampling.sample_generator(cfg.seed, number), stop=ctrl_c,
                )  # fmt: skip
                show(text_stream.pieces(meter.watch(new), tokens.decode, cfg.stop), first)
                first = "\n"
                left -= 1
                if left:
                    ctrl_c.reset()
    if ctrl_c():
        raise Interrupted(signal.SIGINT)
    if cfg.stats:
        remark(f"statistics: {meter.line()}")
