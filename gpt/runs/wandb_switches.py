"""Reads W&B's own switches: variables of the environment, and the settings files that `wandb offline` writes."""

import configparser
import os
from pathlib import Path

from gpt.files.paths import PROJECT_ROOT

PRIVACY = ("auto", "online", "offline", "disabled")  # each sends less than the one before
WORDS = {"run": "online", "shared": "online", "dryrun": "offline", "": "auto"} | {word: word for word in PRIVACY[1:]}
NO = ("", "0", "false", "no", "off", "n", "f", "none")


def resolve(mode: str) -> tuple[str, str]:
    """Where a run with `wandb.mode` goes, and what there is to say about it, "" for nothing: `mode` itself goes before
    W&B's switches, "auto" follows them. The environment goes before the files, as in W&B."""
    wanted, switch = _environment() or _files() or ("auto", "")
    if mode == "auto":
        return wanted, f"{wanted} by {switch}" if wanted in ("offline", "disabled") else ""
    sends_more = PRIVACY.index(mode) < PRIVACY.index(wanted)
    return mode, f"wandb.mode={mode} goes before {switch}" if sends_more else ""


def _environment() -> tuple[str, str] | None:
    """What variables ask for: the more private one of the two."""
    disabled, mode = (os.environ.get(name, "").strip() for name in ("WANDB_DISABLED", "WANDB_MODE"))
    if disabled.lower() not in NO:  # an old word that W&B itself has forgotten, still set by many
        return "disabled", f"WANDB_DISABLED={disabled}"
    return (_mode(mode), f"WANDB_MODE={mode}") if mode else None


def _files() -> tuple[str, str] | None:
    """What settings files ask for: those of the directory that `wandb offline` was typed in, which is this one, the
    project's or $WANDB_DIR, else the user's own; the most private one of several."""
    folders = ["", str(PROJECT_ROOT), os.environ.get("WANDB_DIR") or ""]
    local = [Path(os.path.expanduser(folder), name, "settings") for folder in folders for name in ("wandb", ".wandb")]
    users = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    for files in (local, [Path(os.path.expanduser(users), "settings")]):
        wanted = [(mode, f"{name} in {file.absolute()}") for file in files for name, mode in _settings(file)]
        if wanted:
            return max(wanted, key=lambda choice: PRIVACY.index(choice[0]))
    return None


def _settings(file: Path) -> list[tuple[str, str]]:
    """[("mode=offline", "offline")]: what a settings file says of where runs go. One that cannot be understood may say
    anything: offline nothing is sent, and nothing lost."""
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(file.read_text(encoding="utf-8-sig"))
    except OSError:
        return []
    except (configparser.Error, ValueError):
        return [("what cannot be read", "offline")]
    values = dict(parser.items("default")) if parser.has_section("default") else {}
    choices = []
    if values.get("mode"):
        choices.append((f"mode={values['mode']}", _mode(values["mode"])))
    if values.get("disabled", "").lower() not in NO:  # written by `wandb off` before 2021
        choices.append((f"disabled={values['disabled']}", "disabled"))
    return choices


def _mode(word: str) -> str:
    """The mode that a word of W&B's means, also an old one. One that W&B does not know turns it off."""
    return WORDS.get(word.strip().lower(), "disabled")
