"""Names the places of this project: its root, what a path in a configuration is relative to, the start of a process."""

import os
import secrets
import time
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
# Two starts in the same second must not share a directory.
LAUNCH_ID = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"


def absolute(path: str) -> Path:
    """Paths in a configuration are relative to the project, never to where a script was started."""
    if b"\0" in os.fsencode(path):  # which raises ValueError for what is no text
        raise ValueError("a path has no NUL byte")
    return PROJECT_ROOT / os.path.expanduser(path)
