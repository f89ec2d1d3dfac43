"""Finds all that is wrong with a composed configuration, each fault by its full key, without loading torch."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from gpt import progress
from gpt.config import schema
from gpt.config.environment import DEEPEST
from gpt.config.families import MODELS, AnyModelConfig, Check
from gpt.config.fields import Variants
from gpt.errors import UserError
from gpt.terminal.console import count


def find_errors(cfg: DictConfig, kind: type, groups: Iterable[str] = ()) -> list[str]:
    """One phrase for each thing that is wrong with `cfg` as a `kind`, one of gpt/config/schema.py's three dataclasses.
    `groups`: names that may be meant by a misspelt key, too.

    Raises UserError where nothing else is wrong than weights that values would be read from and that cannot be read."""
    errors: dict[str, str] = {}  # full key: what is wrong with it
    unreadable: list[UserError] = []
    values = _plain(cfg, "", errors, unreadable)
    keys = [*valid_keys(kind, values), *groups]
    try:
        TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        for item in error.errors():
            for key, phrase in _describe(".".join(map(str, item["loc"])), item, keys):
                if not _is_below(key, errors):
                    errors[key] = phrase
    phrases = [*dict.fromkeys(errors.values()), *_contradictions(values, errors)]
    if unreadable and len(phrases) == 1:
        raise unreadable[0]
    return phrases


def valid_keys(kind: type, values: Any = None, prefix: str = "") -> list[str]:
    """Every full key of a schema, sections included; of a section with variants, those of the one that `values` names,
    or of all."""
    keys = []
    for field in dataclasses.fields(kind):
        name = schema.key_of(field.name)
        if name == "unresolved":
            continue
        keys.append(prefix + name)
        section = _get(values, name)
        for nested in _sections(field.type, section):
            keys += valid_keys(nested, section, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def holder(key: str, keys: list[str]) -> str | None:
    """The key of the dict of free keys that `key` is in, as data.columns for data.columns.answer; else None."""
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    return next((name for name in above if name in keys and not any(k.startswith(f"{name}.") for k in keys)), None)


def unknown_key(key: str, valid: Iterable[str]) -> str:
    """The phrase for a key that is in no schema: `unknown key optimzer.lr, did you mean optimizer.lr?`"""
    known = [other for other in valid if other != key and other.startswith("hydra") == key.startswith("hydra")]
    section, leaf = _split(key)
    same_leaf = [other for other in known if _split(other)[1] == leaf]
    siblings = {_split(other)[1]: other for other in known if _split(other)[0] == section}
    leaves = {_split(other)[1]: other for other in known}
    close = (
        difflib.get_close_matches(key, same_leaf, n=1, cutoff=0)
        or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.75)]
        or ([] if siblings else difflib.get_close_matches(key, known, n=1))
        or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
        or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1)]
    )
    return f"unknown key {key}" + (f", did you mean {close[0]}?" if close else "")


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an exception says, or of its cause where it says nothing itself."""
    text = str(error).strip() or str(error.__cause__ or "").strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The UserError in an error's chain of causes: OmegaConf wraps what a resolver that reads a file has raised."""
    while error and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def as_typed(value: Any) -> str:
    """A value as one types it, cut when it is long."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def leaf_keys(key: str, value: Any) -> list[str]:
    """The full keys of all values within `value`, a nested dict at `key`; of anything else only `key` itself."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, item in value.items() for leaf in leaf_keys(f"{key}.{name}", item)]


def _contradictions(values: Any, errors: dict[str, str]) -> Iterator[str]:
    """Values that are fine alone and wrong together."""
    family = _get(values, "model.family")
    own = MODELS[family].config.checks if family in MODELS else ()
    for keys, is_wrong, message in (*CHECKS, *own):
        are_valid = not any(_is_below(key, errors) or any(_is_below(k, [key]) for k in errors) for key in keys)
        given = [_get(values, key) for key in keys]
        if are_valid and None not in given and is_wrong(*given):
            yield message.format(*given)
    targets = _get(values, "finetune.targets")
    if targets and not any(_is_below(key, ["finetune", "model.family"]) for key in errors):
        layers = MODELS[family].config.linear_layers
        for i, target in enumerate(targets):
            if target not in layers:
                has = ", ".join(layers) or "none that can have adapters"
                yield f"finetune.targets.{i}={as_typed(target)}: the linear layers of {family} are {has}"
    keys = ["train.max_steps", "train.max_epochs", "train.max_tokens", "train.tokens_per_step"]
    if "train" not in values or any(_is_below(key, errors) for key in keys):
        return
    steps, epochs, tokens, tokens_per_step = (_get(values, key) for key in keys)
    if steps is None and epochs is not None:
        return  # how long an epoch is, the data says
    length = progress.budget(steps, None, tokens, tokens_per_step)
    if length is None:
        yield "train.max_steps, train.max_epochs and train.max_tokens are all null: a run needs one of them"
        return
    for key in ("schedule.warmup", "schedule.decay", "schedule.window_warmup"):
        part = _get(values, key)
        if part is not None and not _is_below(key, errors) and part >= 1 and int(part) > length[0]:
            yield f"{key} {part:g} is longer than the run: {count(length[0], 'step')} by {length[1]}"


def has_window(model: dict[str, Any]) -> bool:
    """Whether valid settings of a model give any layer a window."""
    config = TypeAdapter(AnyModelConfig).validate_python(model)
    return any(map(config.is_windowed, range(config.n_layer)))


# Whatever the family of the model is.
CHECKS: list[Check] = [
    (("train.tokens_per_step", "model.context_length"), lambda tokens, context: tokens < context,
     "train.tokens_per_step {0} is less than one row of model.context_length {1}"),
    (("data.val_fraction", "data.test_fraction"), lambda val, test: val == 0 or val + test >= 1,
     "data.val_fraction {0} and data.test_fraction {1}: the first must be above 0, their sum below 1"),
    (("sample.references", "data.kind"), lambda n, kind: n > 0 and kind == "text",
     "sample.references {0}: running text has no questions"),
    (("finetune.n_blocks", "model.n_layer"), lambda n, L: n > L,
     "finetune.n_blocks {0} is more than model.n_layer {1}"),
    (("finetune.rank", "model.n_embd"), lambda rank, d: rank > d,
     "finetune.rank {0} is more than model.n_embd {1}"),
    (("model.tie_weights", "optimizer.head_lr"), lambda tied, lr: tied,
     "optimizer.head_lr {1}: with model.tie_weights the head is the embedding; set optimizer.embedding_lr"),
    (("schedule.window_warmup", "model"), lambda _, model: not has_window(model),
     "schedule.window_warmup {0}: no layer of the model has a window, see model.window of model=modern_mini"),
    (("schedule.window_warmup", "schedule.window_start", "model.window"), lambda _, start, window: start >= window,
     "schedule.window_start {1} is not below model.window {2}"),
    (("sweep.rungs", "train.max_tokens"), lambda rungs, tokens: bool(rungs) and rungs[-1] >= tokens,
     "sweep.rungs {0}: the last one is not below the budget, train.max_tokens {1}"),
]  # fmt: skip


def _plain(node: Any, prefix: str, errors: dict[str, str], unreadable: list[UserError]) -> Any:
    """A configuration as dicts, lists and values. What has no value, or leads nowhere, is left out and reported."""
    if isinstance(node, ListConfig):
        return list(_resolved(node, range(len(node)), prefix, errors, unreadable).values())
    if isinstance(node, DictConfig):
        return _resolved(node, list(node), prefix, errors, unreadable)
    return node


def _resolved(
    node: Any, keys: Iterable[Any], prefix: str, errors: dict[str, str], unreadable: list[UserError]
) -> dict[Any, Any]:
    values = {}
    for key in keys:
        full_key = f"{prefix}.{key}" if prefix else str(key)
        if OmegaConf.is_missing(node, key):
            errors[full_key] = f"missing key {full_key}"
        elif full_key.count(".") > DEEPEST:
            errors[full_key] = f"{full_key}: nested too deeply"
        else:
            try:
                values[key] = _plain(node[key], full_key, errors, unreadable)
            except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or back to where it is
                if behind := user_error_behind(error):
                    unreadable.append(behind)
                errors[full_key] = _in_a_list(behind) if behind else f"{full_key}: {first_sentence(error)}"
    return values


def _in_a_list(error: UserError) -> str:
    """An error among others: of its remedy only what may be meant instead."""
    meant = f", {error.remedy.removesuffix('?')}?" if error.remedy.startswith("did you mean") else ""
    return f"{UserError(error.what, error.where)}{meant}"


def _describe(key: str, item: Any, valid: list[str]) -> Iterator[tuple[str, str]]:
    """(full key, phrase) of what one item of pydantic's list is about."""
    if item["type"] == "unexpected_keyword_argument":
        for leaf in leaf_keys(key, item["input"]):
            yield leaf, unknown_key(leaf, valid)
    elif item["type"] == "missing":
        yield key, f"missing key {key}" + (f": {item['msg']}" if item["msg"].startswith("it is one of") else "")
    elif item["type"] in ("dataclass_type", "model_attributes_type"):
        yield key, f"{key}={as_typed(item['input'])}: it is a section, and has keys of its own"
    else:
        yield key, f"{key}={as_typed(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _split(key: str) -> tuple[str, str]:
    """Section and name: `optimizer.lr` -> ("optimizer", "lr")."""
    section, _, leaf = key.rpartition(".")
    return section, leaf


def _is_below(key: str, others: Iterable[str]) -> bool:
    """Whether `key` is one of `others` or inside one of them."""
    return any(key == other or key.startswith(f"{other}.") for other in others)


def _sections(annotation: Any, values: Any) -> list[type]:
    """The dataclasses that a field's type consists of: none for a number."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    for part in get_args(annotation):
        if isinstance(part, Variants):
            return [part.choose(values)] if isinstance(values, dict) else [*part.kinds().values()]
    return [section for part in get_args(annotation) for section in _sections(part, values)]
