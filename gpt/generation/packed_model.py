"""Loads a model to generate text with, its weights in the precision that was asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt.errors import UserError
from gpt.generation import precision, quality, quantized_file
from gpt.runs.model_file import Loaded
from gpt.weights import loading


def load(
    name: str, root: Path, device: torch.device, given: Mapping[str, Any], wanted: str
) -> tuple[Loaded, str]:  # fmt: skip
    """The model that is called `name` and its precision, `wanted` or what "auto" has chosen. Arguments as in
    gpt/weights/loading.py. Raises UserError."""
    path = root / Path(name).expanduser()
    if quantized_file.is_quantized(path):
        loaded, found = quantized_file.read(path, device)
        if wanted not in (found, "float32", "auto"):  # float32 is the default, and so no wish
            raise UserError(f"weights in {found} have no form in {wanted}", str(path), "leave out precision=")
        return loaded, found
    loaded = loading.load(name, root, device, given)
    chosen = quality.choose(loaded) if wanted == "auto" else wanted
    precision.prepare(loaded.model, chosen)
    return loaded, chosen
