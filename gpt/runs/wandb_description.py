"""Describes a run, or a sweep, to Weights & Biases: id, name, settings, results."""

import contextlib
import html
import json
import math
import os
import re
import secrets
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt.config.schema import TrainConfig, WandbConfig, as_dict, nested
from gpt.files import atomic
from gpt.files.json_file import read_object
from gpt.files.paths import PROJECT_ROOT
from gpt.runs import origin
from gpt.terminal.console import escape

# What an agent of a W&B sweep sets for the one run that it starts; W&B then takes the id of no other.
AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


def describe_run(cfg: TrainConfig, run_dir: Path, resumed: bool) -> dict[str, Any]:
    """Arguments of wandb.init for a run. A resumed run goes on under its old id; one that an agent of a W&B sweep
    has started has the id that the agent gave it, and the sweep decides on project and entity."""
    about = _common(cfg.wandb) | {
        "job_type": "train",
        "name": run_dir.name,
        "config": as_dict(cfg) | {"out_dir": str(run_dir)},
        "id": (resumed and remembered(run_dir)) or secrets.token_hex(4),
    }
    typed = [text for text in cfg.overrides if not text.startswith(("wandb.", "sweep.", "hydra.", "out_dir="))]
    job = _read(run_dir / "job.json")
    if job is None and all(name in os.environ for name in AGENT):
        chosen = _chosen_by_agent()
        varied = [text for text in typed if text.partition("=")[0] in chosen]
        about |= {"id": os.environ["WANDB_RUN_ID"], "project": None, "entity": None}
        about["name"] = " ".join(varied or typed) or run_dir.name
    elif job is not None or cfg.sweep.name:
        varied = job.get("name") if job else None  # what was typed for this job only
        about["name"] = varied if varied and isinstance(varied, str) else " ".join(typed) or run_dir.name
        about["group"] = cfg.wandb.group or cfg.sweep.name or run_dir.parent.name
    return about | _notes(run_dir) | {"name": escape(about["name"])[:128]}  # as long as W&B allows


def describe_sweep(cfg: WandbConfig, directory: Path, name: str, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Arguments of wandb.init for a whole sweep, whose jobs have the settings `configs`: those that all of them
    share, by the same names as a run's, and all values of the others. The sweep goes on under its old id."""
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: _distinct(config.get(key) for config in configs) for key in keys}
    varied = {key: each for key, each in values.items() if len(each) > 1}
    shared = {key: None if key in varied else each[0] for key, each in values.items()}  # None: W&B forgets no key
    return (
        _common(cfg)
        | {
            "job_type": "sweep",
            "name": escape(name)[:128],
            "group": cfg.group or name,
            "config": nested(shared) | {"varied": varied, "sweep": {"name": name}, "out_dir": str(directory)},
            "id": remembered(directory) or secrets.token_hex(4),
        }
        | _notes(directory)
    )


def describe_evaluation(cfg: WandbConfig, directory: Path, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of wandb.init for the evaluations of a model, whose results are in `directory`."""
    return _common(cfg) | {
        "job_type": "evaluate",
        "name": escape(f"evaluation of {name}")[:128],
        "group": cfg.group or escape(name)[:128],
        "config": config,
        "id": remembered(directory) or secrets.token_hex(4),
    }


def sweep_summary(statuses: list[str], best: dict[str, Any]) -> dict[str, Any]:
    """{"best/val/loss": 3.2, "jobs": {"all": 12, "completed": 11, "failed": 1}}: what W&B shows of a sweep."""
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    return {f"best/{key}": value for key, value in best.items()} | {"jobs": {"all": len(statuses)} | counts}


def cells(rows: list[list[Any]]) -> list[list[Any]]:
    """The cells of a table as W&B takes them: numbers, None also for NaN and infinity, and text."""

    def cell(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return value if value is None or isinstance(value, int) else escape(str(value))

    return [[cell(value) for value in row] for row in rows]


def remember(directory: Path, run_id: str, mode: str, url: str | None = None, complete: bool = False) -> None:
    """Writes wandb.json, from which a resumed run has its id, and a person the run's address. `complete`: W&B has all
    that there was when the process ended."""
    about = {"id": run_id, "url": url, "mode": mode, "complete": complete}
    atomic.write(directory / "wandb.json", json.dumps(about, indent=2) + "\n")


def is_incomplete(directory: Path) -> bool:
    """Whether W&B has begun to get a run, also offline, and may not have all of it."""
    about = _read(directory / "wandb.json")
    return about is not None and about.get("complete") is not True


def _common(cfg: WandbConfig) -> dict[str, Any]:
    return {"project": cfg.project, "entity": cfg.entity, "group": cfg.group, "tags": list(cfg.tags)}


def _notes(directory: Path) -> dict[str, str]:
    """What a copy says of its origin."""
    copied_from = (origin.read(directory) or {}).get("copied_from")
    return {"notes": f"copied from {escape(str(copied_from))}"} if copied_from else {}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in their order; lists and dicts are values too."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _chosen_by_agent() -> list[str]:
    """The keys whose values the agent has chosen, from the file in which it says so."""
    with contextlib.suppress(OSError, ValueError):
        text = Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text(encoding="utf-8")
        return re.findall(r"^([\w./@]+):$", text, re.MULTILINE)
    return []


def remembered(directory: Path) -> str | None:
    """The id in wandb.json, None when there is none."""
    run_id = (_read(directory / "wandb.json") or {}).get("id")
    return run_id if isinstance(run_id, str) and re.fullmatch(r"[A-Za-z0-9_]{1,64}", run_id) else None


def _read(path: Path) -> dict[str, Any] | None:
    """A small JSON file, None when there is none: the directory may be another person's, and the file anything."""
    with contextlib.suppress(OSError, ValueError):
        return read_object(path, largest=100_000)
    return None


def commit() -> str | None:
    """The commit of this project that is checked out."""
    command = ["git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def page(samples: list[dict[str, Any]]) -> str:
    """Samples as HTML that shows every character, whatever a model has written."""
    keys = {"prompt": "h4", "text": "pre", "reference": "blockquote"}
    shown = [{key: html.escape(escape(str(s[key]), keep_newlines=True)) for key in keys if key in s} for s in samples]
    return "".join(f"<{keys[key]}>{text}</{keys[key]}>\n" for sample in shown for key, text in sample.items())
