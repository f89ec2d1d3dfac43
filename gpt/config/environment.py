"""Records which values come through ${oc.env:NAME}, so that files and W&B get that text and not the value."""

from typing import Any

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

DEEPEST = 10  # sections within sections; two that refer to each other have no end
_reads = 0  # of the environment, in this process


def install() -> None:
    """Replaces OmegaConf's resolver oc.env by one that gives the same and counts how often it is used."""
    OmegaConf.register_new_resolver("oc.env", _read, replace=True)


def unresolved(node: Any, prefix: str = "") -> dict[str, str]:
    """Full key and text of each value that was read from the environment, itself or through other interpolations."""
    texts = {}
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        name, before = f"{prefix}{key}", _reads
        try:
            value = None if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException:  # an interpolation that leads nowhere is reported elsewhere
            continue
        if _reads > before:
            text = OmegaConf.to_container(node, resolve=False)[key]
            # A number that is read from a file whose name comes from the environment (${architecture:...}) is stored.
            if "oc.env" in text or not isinstance(value, int | float):
                texts[name] = text
        elif OmegaConf.is_config(value) and name.count(".") < DEEPEST:
            texts |= unresolved(value, f"{name}.")
    return texts


def _read(*arguments: Any) -> Any:
    global _reads
    _reads += 1
    return oc.env(*arguments)
