"""Reads an adapter of peft's together with the weights that it is for: the merged model's weights."""

from dataclasses import replace
from pathlib import Path

from gpt import tokenizer
from gpt.errors import CHECKPOINT, UserError
from gpt.runs import checkpoint, peft_adapter
from gpt.weights import locate, weight_files
from gpt.weights.source import Source
from gpt.weights.weight_files import Weights


def read(source: Source, root: Path) -> Weights:
    """The weights of any source; of an adapter those of its base, with the adapters to be added to them.

    Raises UserError (3) for what is damaged, and for an adapter that does not fit its base."""
    if source.kind != "adapter":
        return weight_files.read(source)
    adapter = peft_adapter.read(source.path)
    base = weight_files.read(locate.base_of(source, root))
    if base.adapters:
        raise UserError("the model that the adapter is for has adapters of its own", str(base.path), "", CHECKPOINT)
    path = source.path / peft_adapter.WEIGHTS
    pairs = weight_files.pair_adapters(adapter.tensors, base.tensors, adapter.lora, path)
    files = [*base.files, path]
    about = f"adapters of {base.path}, {base.about}"
    weights = replace(base, path=source.path, files=files, about=about, adapters=pairs)
    return of_run(weights, source.path.parent)


def of_run(weights: Weights, run_dir: Path) -> Weights:
    """With the tokenizer, the template and the step of the run that has made the adapter, if it is beside it."""
    steps = checkpoint.listed(run_dir / "checkpoints")
    if not steps:
        return weights
    manifest = checkpoint.read_manifest(steps[-1])
    tokenizer.carried(manifest.tokenizer, steps[-1])
    return replace(weights, identity=replace(manifest.identity, lora=None), step=manifest.step)
