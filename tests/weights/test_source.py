"""What the configuration beside weights says of their architecture."""

import json

import pytest
from test_locate import GPT2

from gpt.errors import UserError
from gpt.weights import source


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tie_word_embeddings": False}, {"tie_weights": False}),
        ({"activation_function": "gelu"}, {"gelu": "exact"}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"gelu": "tanh"}),
        ({"n_inner": 128}, {}),
        ({"n_inner": None, "n_ctx": 24, "layer_norm_epsilon": 1e-05, "attn_pdrop": 0.1, "torch_dtype": "float32"}, {}),
    ],
    ids=str,
)
def test_what_a_configuration_may_say(tmp_path, change, expected):
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | change))
    found = source.of_transformers(tmp_path / "config.json")
    assert {key: getattr(found, key) for key in expected} == expected and found.n_layer == 3


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, [3], 2**31, 10**400])
def test_a_configuration_with_what_is_no_number_names_the_key(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2 | {key: value}))
    with pytest.raises(UserError, match=f"{key} is .*, not a whole number from 1 on") as caught:
        source.of_transformers(path)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    "content",
    ["", "[]", "5", "null", "{", '"gpt2"', "[" * 100_000, '{"model_type": "gpt2"}', "{}", '{"model_type": ["gpt2"]}',
     '{"model_type": "bert", "architectures": {"a": 1}}', json.dumps(GPT2 | {"activation_function": ["gelu_new"]}),
     json.dumps(GPT2 | {"n_inner": [1]}), json.dumps(GPT2 | {"layer_norm_epsilon": {}}), '{"n_layer": 1e999}'],
    ids=range(15),
)  # fmt: skip
@pytest.mark.parametrize("read", [source.of_transformers, source.of_openai])
def test_a_configuration_that_is_none_is_refused(tmp_path, content, read):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.code == 3 and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x80", bytes(10), None])
def test_a_configuration_that_is_no_text_or_not_there_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json damaged") as caught:
        source.of_transformers(path)
    assert caught.value.code == 3


def test_a_configuration_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(10**12)  # takes no room
    with pytest.raises(UserError, match=f"more than {2**26} bytes"):
        source.of_transformers(path)
