"""What Weights & Biases is told about a run besides its rows: id, name, settings, commit, samples as a page."""

import contextlib
import html
import json
import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

from gpt import durable
from gpt.console import escape
from gpt.schema import TrainConfig, as_dict

PROJECT = Path(__file__).resolve().parent.parent


def of(cfg: TrainConfig, run_dir: Path, resumed: bool) -> dict[str, Any]:
    """What wandb.init is told about the run. A resumed run goes on under its old id."""
    overrides = " ".join(o for o in cfg.overrides if not o.startswith(("wandb.", "sweep.")))
    return {
        "project": cfg.wandb.project,
        "entity": cfg.wandb.entity,
        "group": cfg.wandb.group or cfg.sweep.name,
        "job_type": "train",
        "name": (overrides if cfg.sweep.name and overrides else run_dir.name)[:128],  # as long as W&B allows
        "tags": list(cfg.wandb.tags),
        "config": as_dict(cfg) | {"out_dir": str(run_dir)},
        "id": (resumed and _remembered(run_dir)) or secrets.token_hex(4),
    }


def remember(run_dir: Path, run_id: str, mode: str, url: str | None = None) -> None:
    """Writes wandb.json, from which a resumed run has its id, and a person the run's address."""
    durable.write(run_dir / "wandb.json", json.dumps({"id": run_id, "url": url, "mode": mode}, indent=2) + "\n")


def _remembered(run_dir: Path) -> str | None:
    """The id in wandb.json, None when there is none: the directory may be another person's, and the file anything."""
    path = run_dir / "wandb.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size < 10_000:
            about = json.loads(path.read_text(encoding="utf-8"))
            found = about.get("id") if isinstance(about, dict) else None
            if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9_]{1,64}", found):
                return found
    return None


def commit() -> str | None:
    """The commit of this project that is checked out."""
    command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def page(samples: list[dict[str, Any]]) -> str:
    """Samples as HTML that shows every character, whatever a model has written."""
    shown = [[html.escape(escape(str(s[key]), keep_newlines=True)) for key in ("prompt", "text")] for s in samples]
    return "".join(f"<h4>{prompt}</h4>\n<pre>{text}</pre>\n" for prompt, text in shown)
