"""Puts the template around an instruction: one function for training, evaluation and generation."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from gpt.config.data import DataConfig
from gpt.errors import UserError

ALPACA_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Template:
    """The fixed text around an instruction and an optional input, as Stanford Alpaca introduced it."""

    header: str
    header_with_input: str
    instruction: str = "\n\n### Instruction:\n"
    input: str = "\n\n### Input:\n"
    response: str = "\n\n### Response:\n"
    between: str = ""  # an answer and the next instruction of a conversation


TEMPLATES = {
    "alpaca": Template(header=ALPACA_HEADER, header_with_input=ALPACA_HEADER),
    "alpaca_stanford": Template(header=ALPACA_HEADER, header_with_input=ALPACA_HEADER_WITH_INPUT),
    "plain": Template(header="", header_with_input="", instruction="", input="\n", response="\n", between="\n\n"),
}


def format_prompt(template: str | None, instruction: str, input: str = "") -> str:
    """Everything up to the point where the response begins; the input block appears only if `input` is not empty.
    template None: the instruction as it is."""
    if template is None:
        return instruction
    t = TEMPLATES[template]
    header = t.header_with_input if input else t.header
    return header + t.instruction + instruction + (t.input + input if input else "") + t.response


def format_turn(template: str, instruction: str, input: str = "", system: str = "", is_first: bool = True) -> str:
    """A person's turn of a conversation, up to the point where the response begins. The first one is `format_prompt`'s,
    with `system` in the place of the header unless it is empty. A later one follows the response before it as the same
    blocks without a header: models of these templates have learned from single turns."""
    t = TEMPLATES[template]
    header = t.header_with_input if input else t.header
    before = (system + t.between if system else header) if is_first else t.between
    return before + format_prompt(template, instruction, input).removeprefix(header)


def end_of_response(template: str) -> str | None:
    """What a model writes that goes on with the next instruction by itself, instead of ending its response; None where
    nothing marks an instruction."""
    return TEMPLATES[template].instruction.strip() or None


def read_prompt(template: str, prompt: str) -> tuple[str, str]:
    """(instruction, input) that `format_prompt` makes this prompt of. Where a line feed is all that marks an input
    (plain), the second line of an instruction counts as one."""
    t = TEMPLATES[template]
    body = prompt.removeprefix(t.header).removeprefix(t.header_with_input).removeprefix(t.instruction)
    instruction, _, given = body.removesuffix(t.response).partition(t.input)
    return instruction, given


@dataclass(frozen=True)
class Question:
    """A prompt that the model answers, with the reference answer where there is one."""

    instruction: str
    input: str = ""
    reference: str | None = None


def questions(cfg: DataConfig, n_references: int, prepared: Path) -> list[Question]:
    """The prompts of `cfg`, then the first `n_references` records of the validation split, which is in random order."""
    questions = [Question(prompt) for prompt in cfg.prompts]
    if n_references:
        try:
            with open(prepared / "val.jsonl", encoding="utf-8") as file:
                records = [json.loads(line) for line in itertools.islice(file, n_references)]
        except FileNotFoundError as error:
            raise UserError("val.jsonl is missing", str(prepared), "start again: it is prepared again") from error
        questions += [Question(record["instruction"], record["input"], record["output"]) for record in records]
    return questions
