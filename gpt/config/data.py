"""Defines the settings of data: where it is, how it becomes token files, and how these become batches."""

import codecs
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from gpt.config.fields import BelowOne, Count, Seed, Text, section, variants
from gpt.files import paths

BUILT_IN = ("gpt2", "bytes")
TemplateName = Literal["alpaca", "alpaca_stanford", "plain"]
Delimiter = Annotated[str, Field(pattern=r'^(comma|semicolon|tab|pipe|\\t|[^"\r\n\x00])$')]


def _check_encoding(name: str) -> str:
    try:
        "".encode(name)  # what is no encoding of text, such as zip, is refused too
    except (LookupError, UnicodeError, ValueError):
        raise PydanticCustomError("encoding", "such an encoding is not known; windows-1252 and utf-16 are") from None
    return codecs.lookup(name).name


Encoding = Annotated[str, AfterValidator(_check_encoding)]


def _check_tokenizer(name: str) -> str:
    if name not in BUILT_IN and not (paths.absolute(name) / "tokenizer.json").is_file():
        raise PydanticCustomError("tokenizer", "it is gpt2, bytes, or a folder that has a tokenizer.json")
    return name


TokenizerName = Annotated[Text, AfterValidator(_check_tokenizer)]


# The notice of health data, and of models that do not say what they have learned from.
DISCLAIMER = "Generated text can be wrong in every detail; as medical text it must not guide clinical decisions."


@section
class CardConfig:
    """What the data card says about where the data comes from. `notice` goes with what a model writes that has learned
    from it; None: nothing."""

    title: Text
    description: Text
    license: Text
    citation: Text
    notice: Text | None


@section
class InstructionDataConfig:
    """Where questions and answers are, how they become token files (above), and how these become batches (below)."""

    name: Text
    kind: Literal["qa", "helpsteer", "alpaca"]
    path: Text | None
    hub: Text | None
    columns: dict[str, str | None]
    delimiter: Delimiter | None
    encoding: Encoding | None
    prepared_dir: Text
    tokenizer: TokenizerName
    template: TemplateName
    max_tokens: Count | None
    split: Literal["grouped", "random", "sequential"]
    val_fraction: BelowOne
    test_fraction: BelowOne
    split_seed: Seed
    on_bad_row: Literal["error", "skip"]
    card: CardConfig

    document_separator: ClassVar[None] = None

    mask: Literal["response", "all"]
    batching: Literal["packed", "bucketed", "padded"]
    overflow: Literal["split", "truncate", "drop"]
    prompts: list[Text]


@section
class TextDataConfig:
    """Where running text is. The choices that instructions have are fixed here: a text is one long document."""

    name: Text
    kind: Literal["text"]
    path: Text | None
    encoding: Encoding | None
    document_separator: Text | None
    prepared_dir: Text
    tokenizer: TokenizerName
    val_fraction: BelowOne
    test_fraction: BelowOne
    card: CardConfig
    prompts: list[Text]

    hub: ClassVar[None] = None
    columns: ClassVar[dict[str, str | None]] = {}
    delimiter: ClassVar[None] = None
    template: ClassVar[str] = "plain"
    max_tokens: ClassVar[None] = None
    split: ClassVar[str] = "sequential"
    split_seed: ClassVar[int] = 0
    on_bad_row: ClassVar[str] = "error"
    mask: ClassVar[str] = "all"
    batching: ClassVar[str] = "packed"
    overflow: ClassVar[str] = "split"


DataConfig = variants(InstructionDataConfig | TextDataConfig, "kind")
