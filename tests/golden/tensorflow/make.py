"""Writes the checkpoints beside this file with TensorFlow, and what TensorFlow reads back from them.

    pip install tensorflow-cpu==2.21.0 numpy
    python tests/golden/tensorflow/make.py
    python tests/golden/tensorflow/make.py DIRECTORY      instead: random weights of GPT-2 small's size, 498 MB

tiny/ is laid out as OpenAI's GPT-2: gpt2/124M and so on. sharded/ has two data files and several types.
expected.json: for each checkpoint, each variable's shape, type, and the sha256 of its little-endian bytes.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

HERE = Path(__file__).resolve().parent
TINY = {"n_vocab": 257, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
SMALL = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}


def gpt2(rng: np.random.Generator, hparams: dict[str, int], scale: float) -> dict[str, np.ndarray]:
    """Values that each change what the model computes: no zeros, no ones, none like another's."""
    d = hparams["n_embd"]

    def normal(*shape: int, mean: float = 0.0, std: float = scale) -> np.ndarray:
        return rng.normal(mean, std, shape).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/g": normal(d, mean=1.0), f"{name}/b": normal(d)}

    def linear(name: str, n_in: int, n_out: int) -> dict[str, np.ndarray]:
        return {f"{name}/w": normal(1, n_in, n_out), f"{name}/b": normal(n_out)}

    values = {"model/wte": normal(hparams["n_vocab"], d), "model/wpe": normal(hparams["n_ctx"], d)}
    for i in range(hparams["n_layer"]):
        block = f"model/h{i}"
        values |= norm(f"{block}/ln_1") | norm(f"{block}/ln_2")
        values |= linear(f"{block}/attn/c_attn", d, 3 * d) | linear(f"{block}/attn/c_proj", d, d)
        values |= linear(f"{block}/mlp/c_fc", d, 4 * d) | linear(f"{block}/mlp/c_proj", 4 * d, d)
    return values | norm("model/ln_f")


def save(prefix: Path, values: dict[str, np.ndarray], devices: int = 1) -> None:
    """With `devices`, as many data files: the variables are spread over that many logical CPUs."""
    prefix.parent.mkdir(exist_ok=True)
    session = tf.compat.v1.ConfigProto(device_count={"CPU": devices})
    with tf.Graph().as_default(), tf.compat.v1.Session(config=session) as session:
        variables = []
        for i, (name, value) in enumerate(values.items()):
            with tf.device(f"/cpu:{i % devices}"):
                variables.append(tf.compat.v1.get_variable(name, initializer=value, use_resource=False))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(variables, sharded=devices > 1, save_relative_paths=True)
        saver.save(session, str(prefix), write_meta_graph=False)


def read_back(prefix: Path) -> dict[str, dict]:
    reader, found = tf.train.load_checkpoint(str(prefix)), {}
    for name, dtype in sorted(reader.get_variable_to_dtype_map().items()):
        value = reader.get_tensor(name)
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        found[name] = {"shape": list(value.shape), "dtype": dtype.name, "sha256": digest}
    return found


def openai(directory: Path, rng: np.random.Generator, hparams: dict[str, int], scale: float) -> None:
    save(directory / "model.ckpt", gpt2(rng, hparams, scale))
    (directory / "hparams.json").write_text(json.dumps(hparams))


def main() -> None:
    rng = np.random.default_rng(0)
    if len(sys.argv) > 1:
        openai(Path(sys.argv[1]).absolute(), rng, SMALL, 0.02)
        return
    openai(HERE / "tiny", rng, TINY, 0.2)
    types = {"a": np.float32, "b": np.float16, "c": tf.bfloat16.as_numpy_dtype, "d": np.int32, "e": np.int64}
    mixed = {f"{name}/{i}": rng.normal(0, 100, (3, 1 + 2 * i)).astype(types[name]) for name in types for i in range(2)}
    save(HERE / "sharded" / "model.ckpt", mixed | {"step": np.int64(-7)}, devices=2)
    expected = {name: read_back(HERE / name / "model.ckpt") for name in ("tiny", "sharded")}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
