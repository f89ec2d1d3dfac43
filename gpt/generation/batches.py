"""Answers many prompts, several at a time, and prints or keeps the answers in the order of the prompts."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from gpt import sampling
from gpt.config.schema import GenerateConfig
from gpt.errors import Interrupted
from gpt.files import atomic, paths
from gpt.generation import answer_file, samples, text_stream
from gpt.generation.continuation import Row, continue_each
from gpt.machine import free_memory
from gpt.model import LanguageModel
from gpt.prompts import format_prompt
from gpt.runs import interrupt
from gpt.runs.model_file import Loaded
from gpt.terminal.answers import announce_prompt, announce_sample, remark, show
from gpt.terminal.console import count, escape
from gpt.tokenizer import Tokenizer

# Rows of a step; more of them make it hardly faster. Measured on a CPU; those of other devices are guesses.
USEFUL_ROWS = {"cpu": 64, "mps": 64, "cuda": 128}
FREE_SHARE = 0.5  # of the free memory that rows may be chosen to fill
# Settings that a text depends on.
OF_THE_TEXT = ("max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "stop", "seed", "lookup")


@dataclass(frozen=True)
class Job:
    """What is to be computed: prompts as ids, with the numbers of samples of each, and how."""

    model: LanguageModel
    wanted: list[tuple[list[int], int]]
    n_rows: int
    n_columns: int
    seed: int
    draws: sampling.Draws
    ends: Callable[[list[int]], bool]
    lookup: int | None


class Answer(NamedTuple):
    """New ids, without the end of text, and whether max_new_tokens ended them, and not the model or a stop string."""

    ids: list[int]
    is_cut: bool


def write(
    cfg: GenerateConfig, prompts: list[tuple[str, str]], template: str | None, loaded: Loaded, precision: str,
    tokens: Tokenizer,
) -> None:  # fmt: skip
    """Prints the samples of each (instruction, input) to stdout or, with cfg.output, appends them to that file: those
    that it does not have yet. `precision`: of the weights. A signal ends it after the step that is being computed.
    Raises UserError for a file that is not to be gone on with, or that cannot be written."""
    questions = [
        {"prompt": instruction, "input": given, "sample": sample}
        for instruction, given in prompts
        for sample in range(1, cfg.num_samples + 1)
    ]
    path = None if cfg.output is None else paths.absolute(cfg.output)
    with nullcontext() if path is None else answer_file.opened(path) as file, interrupt.deferred() as stop:
        job = planned(cfg, prompts, template, loaded.model, tokens, file.settings if file else None)
        settings = settings_of(cfg, template, loaded, precision, job.n_rows) if file else {}
        n_done = file.go_on(questions, settings) if file else 0
        if n_done:
            remark(f"{escape(str(path))}: {n_done} of {count(len(questions), 'answer')} are there already")
        started, n_tokens = time.perf_counter(), 0
        new = answers(replace(job, wanted=job.wanted[n_done:]), stop)
        for question, answer in zip(questions[n_done:], new, strict=False):
            n_tokens += len(answer.ids)
            text = "".join(text_stream.before(cfg.stop, [tokens.decode(answer.ids)]))
            if file:
                reason = "length" if answer.is_cut else "stop"
                about = {"text": text, "tokens": len(answer.ids), "finish_reason": reason}
                file.append(question, about | {"checkpoint": paths.shareable(loaded.path)}, settings)
            else:
                if question["sample"] == 1:
                    announce_prompt(question["prompt"], question["input"])
                announce_sample(question["sample"], cfg.num_samples)
                show([text], "" if question is questions[0] else "\n")
        if cfg.stats:
            rate = n_tokens / (time.perf_counter() - started)
            remark(f"statistics: {rate:.1f} tokens/s, prompts included, {job.n_rows} at a time")
    if stop.signal:
        kept = f"{path} has {len(file.rows)} of {count(len(questions), 'answer')}" if file else ""
        raise Interrupted(stop.signal, kept + (", and the same command goes on" if file else ""))
    if file:
        remark(f"{escape(str(path))}: {count(len(questions), 'answer')}")


def planned(
    cfg: GenerateConfig, prompts: list[tuple[str, str]], template: str | None, model: LanguageModel, tokens: Tokenizer,
    before: dict[str, Any] | None,
) -> Job:  # fmt: skip
    """What there is to compute. `before`: the settings of answers that are kept already. Raises UserError for a prompt
    that is empty."""
    context_length = model.config.context_length
    texts = [format_prompt(template, *prompt) for prompt in prompts]
    ids = [sampling.checked_prompt(tokens.encode(text), context_length, cfg.max_new_tokens) for text in texts]
    wanted = [(prompt, sample) for prompt in ids for sample in range(cfg.num_samples)]
    n_columns = min(max(map(len, ids)) + cfg.max_new_tokens, context_length)
    longest = max((len(string.encode()) for string in cfg.stop), default=0)  # tokens that a stop string may have

    def ends(new: list[int]) -> bool:
        end = tokens.decode(new[-longest:]) if longest else ""
        return any(string in end for string in cfg.stop)

    n_rows, draws = rows_at_once(cfg, len(wanted), n_columns, model, before), sampling.Draws.of(cfg, tokens.eos)
    return Job(model, wanted, n_rows, n_columns, cfg.seed, draws, ends, cfg.lookup)


def answers(job: Job, stop: interrupt.Stop) -> Iterator[Answer]:
    """The samples in order, each as soon as those before it are there; none more after `stop` returns true."""
    if job.n_rows == 1:
        yield from answers_one_by_one(job, stop)
        return
    begun: deque[Row] = deque()  # rows that have not been yielded

    def rows() -> Iterator[Row]:
        for prompt, sample in job.wanted:
            begun.append(Row(prompt, job.draws.max_new_tokens, sampling.sample_generator(job.seed, sample)))
            yield begun[-1]

    for _ in continue_each(
        job.model, rows(), job.n_rows, job.draws, n_columns=job.n_columns, ends=job.ends, stop=stop
    ):  # fmt: skip
        while begun and begun[0].over:
            row = begun.popleft()
            yield Answer(row.new, not row.stopped and not job.ends(row.new))


def answers_one_by_one(job: Job, stop: interrupt.Stop) -> Iterator[Answer]:
    """As `answers`, with the bits of sampling.generate."""
    cache = sampling.KVCache(job.model.config.context_length)
    wanted = takewhile(lambda _: not stop(), job.wanted)
    for new in samples.one_by_one(job.model, wanted, cache, job.draws, job.seed, job.lookup, stop):
        ids: list[int] = []
        for token in new:
            ids.append(token)
            if job.ends(ids):
                break
        if stop():
            return
        yield Answer(ids, len(ids) == job.draws.max_new_tokens and not job.ends(ids))


def rows_at_once(
    cfg: GenerateConfig, n_wanted: int, n_columns: int, model: LanguageModel, before: dict[str, Any] | None
) -> int:
    """The number of samples, but no more than cfg.batch_size or, where that is "auto", than are useful or fit into
    FREE_SHARE of the free memory. For answers that are kept already it was chosen among fewer samples, maybe: then it
    stays, as another number would round otherwise."""
    wanted = n_wanted if cfg.batch_size == "auto" else min(n_wanted, cfg.batch_size)
    recorded = (before or {}).get("batch_size")
    if type(recorded) is int and recorded >= 1 and (cfg.batch_size == "auto" or recorded < wanted):
        remark(f"batch_size={cfg.batch_size}: {recorded}, as before")
        return recorded
    if cfg.batch_size != "auto":
        return wanted
    device = model.head.device
    fitting = int(FREE_SHARE * free_memory.free(device)) // row_bytes(model, n_columns)
    n_rows = max(1, min(n_wanted, USEFUL_ROWS[device.type], fitting))
    remark(f"batch_size=auto: {n_rows}")
    return n_rows


def row_bytes(model: LanguageModel, n_columns: int) -> int:
    """Memory of a row: its keys and values, as many bytes a token as the model is seen to keep of one, and logits with
    their probabilities in float64, three times: as such, as their sum, and while they are made."""
    cache = sampling.KVCache(1)
    sampling.read(model, [0], cache)
    of_token = sum(tensor.nbytes for pair in cache.layers.values() for tensor in pair)
    return n_columns * of_token + model.vocab_size * (4 + 3 * 8)


def settings_of(
    cfg: GenerateConfig, template: str | None, loaded: Loaded, precision: str, n_rows: int
) -> dict[str, Any]:
    """What a text depends on besides its prompt and sample. The checkpoint is known by the content of its files, not by
    its place."""
    weights = hashlib.sha256("".join(map(atomic.sha256, loaded.files)).encode()).hexdigest()[:16]
    own = {key: getattr(cfg, key) for key in OF_THE_TEXT}
    return {
        "weights": weights, "step": loaded.step, "template": template, **own, "precision": precision,
        "batch_size": n_rows, "device": loaded.model.head.device.type,
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
    }  # fmt: skip
