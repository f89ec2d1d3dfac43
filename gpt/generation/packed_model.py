"""Loads a model to generate text with, its weights in the precision that was asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt.errors import UserError
from gpt.generation import precision, quality, quantized_file
from gpt.machine.device import keep_memory
from gpt.runs.model_file import Loaded
from gpt.weights import loading


def load(
    name: str, root: Path, device: torch.device, given: Mapping[str, Any], wanted: str | None
) -> tuple[Loaded, str]:  # fmt: skip
    """The model that is called `name` and its precision: `wanted`, what "auto" has chosen or, where it is None, that of
    a quantised directory, else float32. Other arguments as in gpt/weights/loading.py. Raises UserError."""
    keep_memory()  # 64 texts at once in bfloat16 take 1.6 times as long without (experiments/generation/README.md)
    path = root / Path(name).expanduser()
    if quantized_file.is_quantized(path):
        loaded, found = quantized_file.read(path, device)
        if wanted not in (found, "auto", None):
            raise UserError(f"weights in {found} have no form in {wanted}", str(path), "leave out precision=")
        return loaded, found
    loaded = loading.load(name, root, device, given)
    chosen = quality.choose(loaded) if wanted == "auto" else wanted or "float32"
    precision.prepare(loaded.model, chosen)
    return loaded, chosen
