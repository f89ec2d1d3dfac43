"""What is wrong with a command line that Hydra refuses: Hydra stops at the first fault, here are all of them."""

import contextlib
import difflib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gpt.config import guard
from gpt.config.value_errors import find_problems, flatten, one_line, shown, unknown, valid_keys
from gpt.sweeps import plugins

ERRORS = (HydraException, OmegaConfBaseException)


def find_faults(root: Path, script: str, kind: type) -> list[str]:
    """One phrase for each thing that is wrong with this process's arguments, for a script `root`/`script`.py.

    Composes what `hydra.main` would, as far as it can be: `kind` is the dataclass that it should become.
    """
    args = get_args_parser().parse_known_args(sys.argv[1:])[0]
    path, name = str(root / (args.config_path or "conf")), args.config_name or script
    faults: list[str] = []
    typed = _parsed(args.overrides, faults)
    try:
        search_path = create_config_search_path(path)
        if args.config_dir and not Path(args.config_dir).is_dir():
            faults.append(f"--config-dir={args.config_dir}: no such directory")
        elif args.config_dir:
            search_path.prepend("command-line", f"file://{Path(args.config_dir).absolute()}", SearchPathQuery("schema"))
        hydra = Hydra.create_main_hydra2(script, search_path)
        searched = [override.input_line for override in typed if override.key_or_group == "hydra.searchpath"]
        repo = hydra.config_loader._parse_overrides_and_create_caching_repo(name, searched)[1]
    except ERRORS:  # where to search is the fault
        return faults
    finally:
        GlobalHydra.instance().clear()

    choices = [override for override in typed if _is_choice(override, repo)]
    texts = [text for override in choices for text in _existing(override, repo, faults)[:1]]
    cfg = _composed(hydra, name, searched, texts, faults)
    if cfg is None:
        return faults
    values = [override for override in typed if override not in choices and override.input_line not in searched]
    if args.multirun or cfg.hydra.mode == RunMode.MULTIRUN:
        for axis in _axes(cfg, typed, faults):
            if _is_choice(axis, repo):
                _existing(axis, repo, faults)
            else:
                values.append(axis)
        faults += plugins.missing(cfg)
        if cfg.hydra.sweeper._target_.endswith("BasicSweeper"):
            intervals = [override.input_line for override in values if override.is_interval_sweep()]
            faults += [f"{text}: an interval needs hydra/sweeper=optuna" for text in intervals]
    else:
        sweeps = [override.input_line for override in typed if override.is_sweep_override()]
        faults += [f"{text}: several values need -m, a list brackets and a text quotes" for text in sweeps]

    known = OmegaConf.to_container(cfg)
    valid = [*valid_keys(kind, known), *flatten(known), *cfg.hydra.runtime.choices]
    for override in values:
        for single in itertools.islice(_singles(override), 1):
            _apply(single, cfg, valid, faults)
    faults += guard.refusals(cfg)
    HydraConfig.instance().set_config(cfg)  # for ${hydra:overrides.task}
    with open_dict(cfg):
        del cfg["hydra"]
    return list(dict.fromkeys([*faults, *find_problems(cfg, kind)]))


def _parsed(texts: Iterable[str], faults: list[str]) -> list[Override]:
    overrides = []
    for text in texts:
        try:
            override = OverridesParser.create().parse_override(text)
            if override.key_or_group:
                overrides.append(override)
            else:
                faults.append(f"{text}: there is no key before the =")
        except Exception as error:  # of the grammar, but also of numbers and nesting beyond what Python takes
            faults.append(f"{shown(text)}: {shown(one_line(error))}")
    return overrides


def _singles(override: Override) -> Iterator[Override]:
    """An override without its sweep: one for each of its values; of an interval its start, of glob(*) nothing."""
    if not override.is_sweep_override():
        yield override
        return
    if override.is_interval_sweep():
        yield from _parsed([f"{override.get_key_element()}={override.value().start}"], [])
    with contextlib.suppress(HydraException):
        for value in override.sweep_string_iterator():
            yield from _parsed([f"{override.get_key_element()}={value}"], [])


def _axes(cfg: DictConfig, typed: list[Override], faults: list[str]) -> list[Override]:
    """The axes of the sweep that a file describes; one that was typed as well replaces the file's."""
    axes = OmegaConf.to_container(cfg.hydra.sweeper).get("params") or {}
    keys = [override.key_or_group for override in typed]
    return _parsed([f"{key}={axis}" for key, axis in axes.items() if key not in keys], faults)


def _is_choice(override: Override, repo: IConfigRepository) -> bool:
    """Whether an override chooses a file, and not a value."""
    return not isinstance(override.value(), dict) and repo.group_exists(override.key_or_group)


def _existing(override: Override, repo: IConfigRepository, faults: list[str]) -> list[str]:
    """The choices in `override`, as text; instead of one that does not exist the most similar one, if there is any."""
    group, texts = override.key_or_group, []
    for single in _singles(override):
        name = single.value()
        if single.is_delete() or isinstance(name, list) or repo.config_exists(f"{group}/{name}"):
            texts.append(str(single.input_line))
        else:
            options = repo.get_group_options(group)
            faults.append(f"{single.input_line}: {_no_such(str(name), options)}")
            texts += [f"{group}={close}" for close in difflib.get_close_matches(str(name), options, n=1)]
    return texts


def _no_such(name: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f"no such file, did you mean {close[0]}?" if close else f"no such file, there are {', '.join(options)}"


def _composed(hydra: Hydra, name: str, always: list[str], choices: list[str], faults: list[str]) -> DictConfig | None:
    """The configuration with these choices or, where one of them is in the way, with the others."""

    def attempt(choices: list[str]) -> DictConfig | str:
        try:
            return hydra.compose_config(name, [*always, *choices], RunMode.RUN, from_shell=False)
        except ERRORS as error:
            return _reason(error)

    cfg = attempt(choices)
    if isinstance(cfg, str) and choices:
        good, bad = [], dict.fromkeys(choices, cfg)
        for choice in [*choices, *choices] if len(choices) > 1 else []:  # one may need another that comes after it
            if choice in bad and isinstance(found := attempt([*good, choice]), str):
                bad[choice] = found
            elif choice in bad:
                good.append(choice)
                del bad[choice]
        for choice, found in bad.items():
            plain = choice.lstrip("+")
            leave_out = plain != choice and not isinstance(attempt([*good, plain]), str)
            faults.append(f"{choice}: " + ("leave out the +" if leave_out else found))
        cfg = attempt(good)
        if isinstance(cfg, str):
            faults.append(cfg)
            cfg = attempt([])
    return None if isinstance(cfg, str) else cfg


def _apply(override: Override, cfg: DictConfig, valid: list[str], faults: list[str]) -> None:
    """Makes one change, or says why that is not possible."""
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
    except ERRORS as error:
        keys = flatten(override.value(), override.key_or_group)
        strangers = [key for key in keys if key not in valid]
        if override.is_delete() and not strangers:
            faults.append(f"{override.input_line}: this key cannot be left out")
        elif override.is_add() and not strangers:
            faults.append(f"{override.input_line}: this key is there already, leave out the +")
        else:
            faults += [unknown(key, valid) for key in strangers] or [f"{override.input_line}: {_reason(error)}"]


def _reason(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.options:
        return _no_such(str(error.missing_cfg_file).rpartition("/")[2], error.options)
    return one_line(error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error)
