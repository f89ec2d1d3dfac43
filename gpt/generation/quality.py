"""Measures what fewer bits cost a model and gain it, and chooses the fastest precision that costs hardly any quality.

The measure is bits per byte, on data that the run has held out. Where there is none, it is on text that the model
writes itself: there the loss of any other model is greater by the divergence of its probabilities from the model's own,
whatever language the model has learned (Gibbs' inequality), so that nothing must be known of its data.
"""

import copy
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt import tokenizer
from gpt.data import prepared
from gpt.data.batching import Split, eval_segments
from gpt.errors import UserError
from gpt.evaluation import scoring
from gpt.files import atomic, paths
from gpt.files.json_file import read_object
from gpt.generation import precision
from gpt.generation.continuation import continue_all
from gpt.machine.device import choose_dtype
from gpt.model import LanguageModel
from gpt.runs.model_file import Loaded
from gpt.sampling import Draws, KVCache, eval_mode, next_logits, sample_generator
from gpt.weights import hub_card

log = logging.getLogger(__name__)

FORMAT = 1
TARGETS = 2048  # tokens that are scored: the loss of int8 varies by 0.01 % between so many
LARGEST_LOSS = 0.001  # of bits per byte, as a part of those in float32
ROWS, WRITTEN = 16, 128  # texts that a model without data writes, and tokens of each, together TARGETS
SECONDS = 0.5  # for which tokens are generated to measure how long one takes: the fastest counts, as others compute too


@dataclass(frozen=True)
class Measured:
    """What a precision costs and takes."""

    bits_per_byte: float
    seconds_per_token: float


def choose(loaded: Loaded) -> str:
    """The fastest precision whose loss is below LARGEST_LOSS, for a model in float32 on its device, and says why.

    What is measured is kept beside the weights, with their sha256, for the same processor and threads."""
    path, identity = beside(loaded.path), identity_of(loaded)
    found = read(path, identity)
    if found is None:
        log.info("precision=auto measures the model in each precision, once")
        split, mask, source = held_out(loaded) or written(loaded)
        found = source, {name: measured for name in ("float32", *precision.LAYERS)
                         if (measured := measure(loaded, name, split, mask))}  # fmt: skip
        keep(path, identity, *found)
    source, results = found
    plain = results["float32"]
    near = {name: own for name, own in results.items() if loss(own, plain) < LARGEST_LOSS}
    best = min(near, key=lambda name: near[name].seconds_per_token)
    described = "; ".join(
        f"{name} {1e3 * own.seconds_per_token:.1f} ms a token, {loss(own, plain):+.2%} bits per byte"
        for name, own in results.items()
    )
    log.info(f"precision=auto is {best}, the fastest below {LARGEST_LOSS:+.1%}, on {source}: {described}")
    return best


def loss(own: Measured, plain: Measured) -> float:
    """By what part more bits per byte a precision needs than float32; of a text of no bytes nothing can be said."""
    if not plain.bits_per_byte:
        return 0.0 if own is plain else math.inf
    return own.bits_per_byte / plain.bits_per_byte - 1


def measure(loaded: Loaded, name: str, split: Split, mask: str) -> Measured | None:
    """A model of its own in this precision; None where the device has no operators for it."""
    try:
        model = precision.prepare(copy.deepcopy(loaded.model), name)
    except UserError as error:
        log.info(str(error))
        return None
    tokens = tokenizer.load(loaded.tokenizer_name)
    return Measured(bits_per_byte(model, split, mask, tokens.bytes_per_token()), seconds_per_token(model))


def held_out(loaded: Loaded) -> tuple[Split, str, str] | None:
    """The validation split of the run that a model is of, which tokens of it are scored, and what it is called; None
    where it is not there any more, or the model is of no run."""
    settings = hub_card.find_record(loaded.path).settings.get("data")
    if not isinstance(settings, dict):
        return None
    place, fingerprint = settings.get("prepared_dir"), settings.get("fingerprint")
    if not isinstance(place, str) or not isinstance(fingerprint, str):  # a checkpoint may come from anybody
        return None
    try:
        data = prepared.with_fingerprint(paths.absolute(place), fingerprint)
        split = Split.open(data.folder, "val")
    except UserError as error:
        log.info(f"{error.what}; the model is measured on text of its own")
        return None
    mask = settings.get("mask", "response")
    return (split, mask, f"the val split of {data.meta['settings']['name']}") if len(split.documents) else None


def written(loaded: Loaded) -> tuple[Split, str, str]:
    """Texts that a model writes at temperature 1, from the end of a text on."""
    model, eos = loaded.model, tokenizer.load(loaded.tokenizer_name).eos
    length = min(WRITTEN, model.config.context_length - 1)
    rows = -(-ROWS * WRITTEN // length)
    draws = Draws(length, eos=None, temperature=1.0, top_k=None, top_p=None)
    texts = continue_all(model, [[eos]] * rows, draws, [sample_generator(0, row) for row in range(rows)])
    ids = [[eos, *text.ids] for text in texts]
    ends = np.cumsum([len(own) for own in ids])
    starts = ends - [len(own) for own in ids]
    documents = np.stack([starts, starts + 1, ends], axis=1)
    return Split(np.concatenate([np.array(own) for own in ids]), documents, "own"), "all", "text of the model's own"


def bits_per_byte(model: LanguageModel, split: Split, mask: str, bytes_per_token: np.ndarray) -> float:
    """Of the first TARGETS tokens of a split that are text. Those of control tokens count as nothing. Raises UserError
    (4) for a loss that is not finite."""
    context_length = model.config.context_length
    segments = eval_segments(split, context_length, mask, TARGETS)
    rows = [
        row
        for which in scoring.grouped(segments, max(TARGETS, context_length))
        for row in scoring.score(model, split, segments, which, bytes_per_token)
    ]
    return sum(row["text nats"] for row in rows) / math.log(2) / max(1, sum(row["bytes"] for row in rows))


def seconds_per_token(model: LanguageModel) -> float:
    """The time that the model takes for a token after another, when nobody disturbs it."""
    cache, least, begun = KVCache(model.config.context_length), math.inf, time.perf_counter()
    with eval_mode(model), torch.inference_mode():
        while time.perf_counter() - begun < SECONDS:
            cache.length %= model.config.context_length
            start = time.perf_counter()
            next_logits(model, [0] * (cache.length + 1), cache)
            least = min(least, time.perf_counter() - start)
    return least


def beside(path: Path) -> Path:
    """Where it is kept what was measured of a checkpoint or a file: a checkpoint's own folder has its sums."""
    in_run = path.parent.name == "checkpoints"
    return (
        path.parent.parent / f"precision_{path.name}.json" if in_run else path.with_name(f"{path.name}.precision.json")
    )


def identity_of(loaded: Loaded) -> dict[str, Any]:
    """What a measurement depends on."""
    where = loaded.model.head.device
    return {
        "format": FORMAT,
        "weights": {file.name: atomic.sha256(file) for file in loaded.files},
        "device": str(where), "processor": torch.backends.cpu.get_cpu_capability(),
        "products": str(choose_dtype("auto", where)), "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }  # fmt: skip


def keep(path: Path, identity: dict[str, Any], source: str, results: dict[str, Measured]) -> None:
    """Writes what was measured; a folder that cannot be written to is no error."""
    content = {"identity": identity, "text": source, "measured": {name: asdict(own) for name, own in results.items()}}
    try:
        atomic.write(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        log.info(f"{path} is not written: {error.strerror}; the next time measures again")


def read(path: Path, identity: dict[str, Any]) -> tuple[str, dict[str, Measured]] | None:
    """What was measured of these weights on this processor; None where nothing was, or what is there is damaged."""
    try:
        content = read_object(path)
        results = {name: Measured(**own) for name, own in content["measured"].items()}
        values = [value for own in results.values() for value in asdict(own).values()]
        is_sound = results.keys() <= {"float32", *precision.LAYERS} and "float32" in results
        if is_sound and all(isinstance(value, float) and 0 < value < math.inf for value in values):
            return (str(content["text"]), results) if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
