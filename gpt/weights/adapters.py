"""Reads an adapter of peft's together with the weights that it is for: the merged model's weights."""

from dataclasses import replace
from pathlib import Path

from gpt.errors import CHECKPOINT, UserError, unusable
from gpt.runs import checkpoint, peft_adapter
from gpt.terminal.console import escape
from gpt.weights import locate, tensor_names, weight_files
from gpt.weights.source import Source
from gpt.weights.weight_files import Adapters, Weights


def read(source: Source, root: Path) -> Weights:
    """The weights of any source; of an adapter those of its base, with the adapters to be added to them.

    Raises UserError (3) for what is damaged, and for an adapter that does not fit its base."""
    if source.kind != "adapter":
        return weight_files.read(source)
    adapter = peft_adapter.read(source.path)
    base = weight_files.read(locate.base_of(source, root))
    if base.adapters:
        raise UserError("the model that the adapter is for has adapters of its own", str(base.path), "", CHECKPOINT)
    table: Adapters = {}
    for name, a in adapter.tensors.items():
        layer = name.removesuffix(".lora_a")
        if layer == name:
            continue
        b = adapter.tensors.get(f"{layer}.lora_b")
        weight = base.tensors.get(f"{layer}.weight", ())
        shape = tensor_names.shape(weight) if weight else "missing"
        if b is None or shape != [b.shape[0], a.shape[1]]:
            wanted = "missing" if b is None else [b.shape[0], a.shape[1]]
            what = f"adapter {escape(layer)}: for a weight of {wanted}, which is {shape} in {base.path}"
            raise unusable(source.path / peft_adapter.WEIGHTS, what)
        table[f"{layer}.weight"] = a, b, adapter.lora.alpha / adapter.lora.rank
    if 2 * len(table) != len(adapter.tensors):
        raise unusable(source.path / peft_adapter.WEIGHTS, "an adapter of which one half is missing")
    files = [*base.files, source.path / peft_adapter.WEIGHTS]
    about = f"adapters of {base.path}, {base.about}"
    weights = replace(base, path=source.path, files=files, about=about, adapters=table)
    return of_run(weights, source.path.parent)


def of_run(weights: Weights, run_dir: Path) -> Weights:
    """With the tokenizer, the template and the step of the run that has made the adapter, if it is beside it."""
    steps = checkpoint.listed(run_dir / "checkpoints")
    if not steps:
        return weights
    manifest = checkpoint.read_manifest(steps[-1])
    return replace(weights, identity=replace(manifest.identity, lora=None), step=manifest.step)
