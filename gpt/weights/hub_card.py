"""Writes the README.md of an exported model: front matter for the Hugging Face hub, then a card for people.

It says what the checkpoint and its run have on record. What they have not is "not recorded", and never guessed.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpt import tokenizer
from gpt.config import run_settings
from gpt.config.families import GPT2Config, ModelConfig, ModernConfig
from gpt.config.schema import METRIC
from gpt.errors import UserError
from gpt.files.hub import PINNED
from gpt.files.jsonl import read_rows
from gpt.prompts import format_prompt
from gpt.runs import checkpoint
from gpt.runs.model_card import (
    UNKNOWN,
    architecture,
    best_row,
    evaluated,
    held_out,
    measured,
    notice,
    provenance,
    setting,
    shown,
    table,
    template,
)
from gpt.runs.model_file import LAST_MODEL, Loaded
from gpt.terminal.console import count, escape
from gpt.weights import llama_config

OPENAI = "openai-community/"  # where the hub has OpenAI's weights
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # on the hub
ENGLISH = ("sample", "medquad", "helpsteer")  # the data sets of conf/data/ whose language is known


@dataclass(frozen=True)
class Record:
    """What is on disk about the run that a model comes from; all of it may be missing."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    val_loss: float | None  # of the checkpoint itself


def find_record(path: Path) -> Record:
    """What the files beside a checkpoint or a model file, `Loaded.path`, say. Those of other projects have none."""
    settings, rows, val_loss, run = {}, [], None, path.parent
    with contextlib.suppress(UserError, OSError, ValueError, RecursionError, yaml.YAMLError):
        if (path / checkpoint.MANIFEST).is_file():
            run = path.parent.parent
            val_loss = checkpoint.read_manifest(path).val_loss
            settings = checkpoint.read_config(path)
        # A file of another name may have come from anywhere.
        elif path.name == LAST_MODEL:
            settings = run_settings.read(run / run_settings.FILE)
        if settings:
            rows = read_rows(run / "metrics.jsonl")
    return Record(settings, rows, val_loss)


def text(loaded: Loaded) -> str:
    """The whole file."""
    record, config = find_record(loaded.path), loaded.model.config
    title = shown(setting(record.settings, "data.card.title"))
    parts = [
        f"---\n{yaml.safe_dump(front_matter(record.settings, config), sort_keys=False, allow_unicode=True)}---",
        f"# {shown(config.name)} GPT" + (f" on {title}" if title != UNKNOWN else ""),
        *notice(record.settings).splitlines(),
        table({
            **architecture(config, loaded.model.n_parameters()),
            "tokenizer": f"{loaded.tokenizer_name}, {loaded.model.vocab_size:,} tokens",
            "prompt template": template(loaded.template),
            "training data": training_data(record.settings),
            **provenance(record.settings),
            "trained for": trained_for(loaded.step, record.rows),
        }),
        "## How well it does",
        metrics(loaded.step, record),
        "## How to use it",
        usage(loaded, record.settings),
        "## Licence",
        licence_in_words(record.settings),
        "## This directory",
        "`sha256sum -c SHA256SUMS` verifies the files. To put them on the hub, which nothing does by itself:",
        "    hf auth login\n    hf upload <user>/<name> <this directory>",
        "llama.cpp reads them after `python convert_hf_to_gguf.py <this directory>`." + gelu_in_llama_cpp(config),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def front_matter(settings: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What the hub reads (huggingface.co/docs/hub/model-cards). Keys about which nothing is known are left out."""
    base, hub = base_model(settings), setting(settings, "data.hub")
    name = setting(settings, "data.name")
    is_from_hub = setting(settings, "data.path") is None and REPOSITORY.fullmatch(str(hub))
    metadata = {
        "license": "mit" if base else "other",
        "language": ["en"] if base or name in ENGLISH else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "datasets": [hub] if is_from_hub else None,
        "tags": [model_type(config), *([shown(name)] if name != UNKNOWN else [])],
    }
    return {key: value for key, value in metadata.items() if value is not None}


def base_model(settings: dict[str, Any]) -> str | None:
    """The name on the hub of those of OpenAI's weights with which the run began, if it did."""
    name = str(setting(settings, "init.from")).removeprefix(OPENAI)
    return OPENAI + name if name in PINNED else None


def model_type(config: ModelConfig) -> str:
    """What transformers calls the family."""
    return llama_config.kind_of(config) if isinstance(config, ModernConfig) else config.family


def training_data(settings: dict[str, Any]) -> str:
    """Description and fingerprint."""
    fingerprint = str(setting(settings, "data.fingerprint"))
    description = shown(setting(settings, "data.card.description"))
    return description if fingerprint == UNKNOWN else f"{description} Fingerprint {shown(fingerprint[:12])}"


def trained_for(step: int, rows: list[dict[str, Any]]) -> str:
    """Steps, and tokens where the run's metrics have that step."""
    if not step:  # of other projects' files
        return UNKNOWN
    tokens = [row["tokens"] for row in rows if row.get("step") == step and isinstance(row.get("tokens"), int)]
    return f"{count(step, 'step')}, " + (count(tokens[0], "token") if tokens else f"tokens {UNKNOWN}")


def metrics(step: int, record: Record) -> str:
    """How good these very weights are, and the best ones of their run, on what is held out."""
    evaluations = evaluated(record.rows)
    own = next((row for row in evaluations if row["step"] == step), None)
    if own is None and record.val_loss is not None:
        own = {METRIC: record.val_loss, "val/perplexity": math.exp(min(record.val_loss, 700))}
    best = best_row(record.rows)
    if own is None and best is None:
        return "No evaluation is on record."
    lines = [f"Validation of these weights, at step {step:,}: {measured(own) if own else UNKNOWN}."]
    if best and best["step"] != step:
        lines.append(f"The best of the run was at step {best['step']:,}: {measured(best)}.")
    return " ".join([*lines, f"Measured {held_out(record.settings)}."])


def usage(loaded: Loaded, settings: dict[str, Any]) -> str:
    """The prompt as it was in training, and a program that uses it."""
    prompts = setting(settings, "data.prompts")
    has_prompt = isinstance(prompts, list) and prompts and isinstance(prompts[0], str)
    example = prompts[0] if has_prompt else "Every effort moves you"
    parts = []
    if loaded.template:
        example = format_prompt(loaded.template, example)
        parts += [
            "The prompt, without an input and with one; it ends with a line feed:",
            fenced("text", format_prompt(loaded.template, "{instruction}")),
            fenced("text", format_prompt(loaded.template, "{instruction}", "{input}")),
        ]
    else:
        parts.append("It goes on with any text; there is no template.")
    tokens = tokenizer.load(loaded.tokenizer_name)
    room = loaded.model.config.context_length - len(tokens.encode(example))
    alone = ", add_special_tokens=False" if tokens.files else ""  # of what some tokenizers put before a text
    program = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or <user>/<name> on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
prompt = {json.dumps(example)}
inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True{alone})
output = model.generate(**inputs, max_new_tokens={max(1, min(200, room))})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
    return "\n\n".join([
        *parts,
        fenced("python", program),
        "It is greedy unless told otherwise. `split_special_tokens`: a text that says "
        f"`{escape(tokens.decode([tokens.eos]))}` is a text, as it was in training, and not the control token.",
    ])  # fmt: skip


def fenced(language: str, content: str) -> str:
    return f"```{language}\n{content.rstrip()}\n```"


def licence_in_words(settings: dict[str, Any]) -> str:
    """Of the weights: known when they began as OpenAI's, else whoever publishes them has to say."""
    if base := base_model(settings):
        return (
            f"The weights began as {base}, which OpenAI released under the (modified) MIT license. The data has its "
            "own licence, named above."
        )
    return (
        f"Of the weights: {UNKNOWN}. Whoever publishes them chooses one, which the licence of the data, named above, "
        "has to allow, and writes it at the top of this file."
    )


def gelu_in_llama_cpp(config: ModelConfig) -> str:
    """GELU is the tanh form there, whatever config.json says."""
    note = " It computes the tanh form of GELU, this model has learned with the exact one: figures differ a little."
    return note if isinstance(config, GPT2Config) and config.gelu == "exact" else ""
