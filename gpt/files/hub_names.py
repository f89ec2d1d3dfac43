"""Names the weights of the Hugging Face hub that are known by their checksums, and tells such names from paths."""

from pathlib import Path

PINNED = {  # of openai-community: commits
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
WEIGHTS = {  # the sha256 of model.safetensors in each of these
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    "gpt2-large": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}

# What files of weights and those beside them end with: a name that does is not that of a repository.
FILES = (
    ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".zip", ".json", ".index", ".meta", ".h5", ".npz", ".gguf",
    ".onnx", ".pkl",
)  # fmt: skip


def is_repository(name: str, *starts: Path) -> bool:
    """Whether a name of weights is one of PINNED or <owner>/<name>, and not a path: that begins with `.`, `/` or `~`,
    ends like a file or with `/`, or its first folder exists at one of `starts`. gpt2/355M is a folder of OpenAI's."""
    first = name.partition("/")[0]
    is_path = name.startswith((".", "/", "~")) or name.lower().endswith((*FILES, "/")) or first in PINNED
    is_path = is_path or name.count("/") != 1 or any((start / first).exists() for start in starts)
    return name in PINNED or not is_path
