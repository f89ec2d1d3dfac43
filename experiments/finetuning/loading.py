"""What it takes to load GPT-2 small's weights from each format, and whether the model is the one that they were of.

    python experiments/finetuning/loading.py [--tensorflow DIRECTORY] [--turns 5]

The files hold random weights of GPT-2 small's shapes, written by transformers, or by TensorFlow (the directory, see
tests/golden/tensorflow/make.py). Each load is a process of its own, on files that are in the disk's cache. Seconds and
memory are those of the load alone: torch is imported before. Memory is the growth of the peak, over the 498 MB of the
model. The difference is the largest one of the logits of 64 tokens from those of transformers' model.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt.machine import free_memory
from gpt.runs import checkpoint, model_file
from gpt.terminal import console
from gpt.weights import loading, tensor_names, tf_bundle

TOKENS = torch.arange(100, 164)[None]


def load(name: str, logits: Path) -> None:
    """In a process of its own: prints seconds and bytes."""
    console.setup(quiet=True)
    torch.ones(1) @ torch.ones(1)
    before, started = free_memory.peak(), time.perf_counter()
    model = loading.load(name, Path("/"), torch.device("cpu")).model
    print(time.perf_counter() - started, free_memory.peak() - before)
    with torch.no_grad():
        torch.save(model(TOKENS), logits)


def write_formats(folder: Path) -> dict[str, tuple[Path, str]]:
    """For each format but TensorFlow's a file or directory, and the file with the logits that are expected of it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.save_pretrained(folder / "transformers")
    model.save_pretrained(folder / "sharded", max_shard_size="100MB")
    (folder / "bin").mkdir()
    weights = model.state_dict()
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    shutil.copy(folder / "transformers" / "config.json", folder / "bin")
    torch.save(book(weights), folder / "book.pth")
    settings = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": True, "vocab_size": 50257}
    turned = {name: tensor.T.contiguous() if is_conv1d(name) else tensor for name, tensor in weights.items()}
    torch.save({"model": turned, "model_args": settings, "iter_num": 0}, folder / "ckpt.pt")
    loaded = loading.load(str(folder / "transformers"), folder, torch.device("cpu"))
    identity = checkpoint.Identity(loaded.model.config, 50257, "gpt2", None)
    model_file.save_model(folder / "last_model.pt", loaded.model, identity, 0)
    with torch.no_grad():
        torch.save(model(TOKENS).logits, folder / "tanh.pt")
        exact = GPT2LMHeadModel(GPT2Config(activation_function="gelu")).eval()
        exact.load_state_dict(weights)
        torch.save(exact(TOKENS).logits, folder / "exact.pt")
    return {
        "transformers, safetensors": (folder / "transformers", "tanh.pt"),
        "transformers, shards": (folder / "sharded", "tanh.pt"),
        "transformers, .bin": (folder / "bin", "tanh.pt"),
        "the book's .pth, untied": (folder / "book.pth", "tanh.pt"),
        "nanoGPT's ckpt.pt": (folder / "ckpt.pt", "exact.pt"),
        "last_model.pt": (folder / "last_model.pt", "tanh.pt"),
    }


def is_conv1d(name: str) -> bool:
    return tensor_names.MATRIX.fullmatch(name.removeprefix("transformer.")) is not None


def book(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' model under the book's names, with a head of its own."""
    names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "ff.layers.0", "mlp.c_proj": "ff.layers.2"}
    found = {"tok_emb.weight": weights["transformer.wte.weight"], "pos_emb.weight": weights["transformer.wpe.weight"]}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        if name.startswith("ln_f"):
            found[f"final_norm.{'scale' if name.endswith('weight') else 'shift'}"] = tensor
        if not name.startswith("h."):
            continue
        _, number, rest = name.split(".", 2)
        layer, leaf = rest.rsplit(".", 1)
        block = f"trf_blocks.{number}"
        tensor = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        if layer == "attn.c_attn":
            for part, word in zip(tensor.chunk(3), ("query", "key", "value"), strict=True):
                found[f"{block}.att.W_{word}.{leaf}"] = part.clone()
        elif layer == "attn.c_proj":
            found[f"{block}.att.out_proj.{leaf}"] = tensor
        else:
            leaf = {"weight": "scale", "bias": "shift"}[leaf] if layer.startswith("ln") else leaf
            found[f"{block}.{names[layer]}.{leaf}"] = tensor
    mask = torch.ones(1024, 1024).triu(1)
    found |= {f"trf_blocks.{i}.att.mask": mask.clone() for i in range(12)}
    return found | {"out_head.weight": weights["lm_head.weight"].clone()}


def expected_of_tensorflow(directory: Path, into: Path) -> None:
    """What transformers' model computes with the numbers of a TensorFlow checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    _, parts = tensor_names.openai(tf_bundle.read(directory / "model.ckpt"))
    weights = {
        f"transformer.{name}": part.T if tensor_names.MATRIX.fullmatch(name) else part for name, [part] in parts.items()
    }
    model.load_state_dict(weights, strict=False)
    torch.save(model(TOKENS).logits.detach(), into)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensorflow", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load[0], Path(args.load[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        formats = write_formats(folder)
        if args.tensorflow:
            expected_of_tensorflow(args.tensorflow, folder / "tensorflow.pt")
            formats["OpenAI's TensorFlow"] = (args.tensorflow.absolute(), "tensorflow.pt")
        figures: dict[str, list[tuple[float, float]]] = {key: [] for key in formats}
        for _ in range(args.turns):
            for key, (path, _) in formats.items():
                command = [sys.executable, __file__, "--load", str(path), str(folder / f"{key}.pt")]
                seconds, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                figures[key].append((float(seconds), int(size) / 497_759_232))
        print(f"{'':27}{'seconds':>22}  memory / weights  difference of logits")
        for key, values in figures.items():
            seconds, shares = ([value[i] for value in values] for i in (0, 1))
            theirs = torch.load(folder / formats[key][1], weights_only=True)
            apart = (torch.load(folder / f"{key}.pt", weights_only=True) - theirs).abs().max().item()
            spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            print(f"{key:27}{spread:>22}{max(shares):>18.2f}{apart:>22.1e}")


if __name__ == "__main__":
    main()
