"""Leads a conversation in the terminal: reads what a person types, obeys commands, and shows the answers."""

import contextlib
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from gpt.files import atomic, paths
from gpt.generation.conversation import Conversation
from gpt.runs import interrupt
from gpt.terminal import answers, console

PROMPT, MORE = "> ", ". "
BLOCK = '"""'
HINT = "/help lists the commands. Ctrl-C ends an answer, Ctrl-D the conversation."
COMMANDS = {
    "/help": "these lines",
    "/reset": "forget all turns",
    "/system TEXT": "begin with TEXT, not with the template's header; without TEXT, with that",
    "/temperature X": "0: always the likeliest token; 1: as the model has it",
    "/save FILE": "write all turns as a row of JSON",
    "/quit": "end the conversation",
    "\\": "at the end of a line: the next one belongs to it",
    BLOCK: "around several lines: they belong together",
    "//": "at the beginning: a text that begins with one /",
}


def say(sentence: str) -> None:
    """A remark, broken between words where the terminal ends."""
    answers.remark(console.wrapped(sentence))


def edit_lines() -> None:
    """Lines can be edited, earlier ones come back with the arrow keys, and a pasted block is one text, where Python has
    GNU readline; with others it is edited as far as these can, and without any as the terminal can. Lines are kept in
    memory only."""
    with contextlib.suppress(ImportError):  # Windows
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def talk(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Answers until `/quit` or the end of the input. A Ctrl-C ends the answer or drops the line; the second one at once
    is the process's, as is any other signal."""
    ctrl_c = interrupt.AnswerEnd()
    edit_lines()
    say(HINT)
    while True:
        try:
            text = read_turn(read)
        except (EOFError, OSError):  # also of a terminal that is closed
            print()
            return
        except UnicodeDecodeError:
            say("that is not UTF-8, and is dropped")
            continue
        except KeyboardInterrupt as signal:
            print()  # what comes next has a line of its own
            if getattr(signal, "code", 130) != 130 or ctrl_c.follows():
                raise
            interrupt.end_at_once()
            say("Ctrl-C again at once ends the conversation")
            continue
        if text.startswith("/") and not text.startswith("//"):
            if not obey(conversation, text):
                return
        elif text.strip() or (conversation.template is None and conversation.turns):
            answer(conversation, text.removeprefix("/"), ctrl_c)


def read_turn(read: Callable[[str], str]) -> str:
    """What a person types: one line; or several, where each but the last ends with a backslash, or between two BLOCKs.
    Raises what `read` raises, which is `input`."""
    text = read(PROMPT)
    if text.startswith(BLOCK):
        text = text.removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            text += "\n" + read(MORE)
        return text.rstrip().removesuffix(BLOCK).strip("\n")
    while text.endswith("\\"):
        text = text.removesuffix("\\") + "\n" + read(MORE)
    return text


def answer(conversation: Conversation, written: str, ctrl_c: interrupt.AnswerEnd) -> None:
    """Shows the model's answer to what was written, as it is made, and says what the model does not see any more."""
    if conversation.template is not None:
        written = written.strip()
    context = f"the context of {conversation.model.config.context_length} tokens"
    if n := conversation.make_room(written):
        oldest = "turn, which is" if n == 1 else f"{n} turns, which are"
        what = f"oldest {oldest}" if conversation.template else f"first {n} tokens, which are"
        say(f"note: {context} has no room for the {what} left out")
    with ctrl_c:
        answers.show(conversation.answer(written, ctrl_c))
    if conversation.is_full():
        say(f"note: the answer went beyond {context}: its end was written without the beginning")
    if conversation.cfg.stats:
        say(f"statistics: {conversation.meter.line()}")
    print()


def obey(conversation: Conversation, text: str) -> bool:
    """Does what a command says. Returns false where it ends the conversation."""
    command, _, argument = text.partition(" ")
    argument = argument.strip()
    if command == "/quit":
        return False
    if command == "/help":
        for name, meaning in COMMANDS.items():
            answers.remark(textwrap.fill(f"{name:<16}{meaning}", console.width(), subsequent_indent=" " * 4))
    elif command == "/reset":
        conversation.reset()
        say("all turns are forgotten")
    elif command == "/system" and conversation.template is None:
        say("a model of plain text has learned no instructions: it goes on with what it reads")
    elif command == "/system":
        conversation.system = argument
        say(f"the conversation begins with {'that' if argument else 'the header of the template'}")
    elif command == "/temperature":
        set_temperature(conversation, argument)
    elif command == "/save":
        save(conversation, argument)
    else:
        say(f"unknown command {command}; /help lists them, and // begins a text with /")
    return True


def set_temperature(conversation: Conversation, text: str) -> None:
    """From the next answer on. Another text than a number from 0 on changes nothing."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 <= value < math.inf:
        conversation.temperature = value
    else:
        say("a number from 0 on is needed, such as /temperature 0.8")
    say(f"temperature {conversation.temperature:g}")


def save(conversation: Conversation, name: str) -> None:
    """Writes a new file, whose name is relative to where the user is. What prevents it is said in one line."""
    if not name:
        say("a name is needed, such as /save conversation.jsonl")
        return
    try:
        path = paths.absolute(name, Path.cwd())
        if path.exists():
            say(f"there is a {path} already; choose another name")
            return
        atomic.write(path, json.dumps(conversation.record(), ensure_ascii=False) + "\n")
        answers.remark(f"saved: {path}")  # unbroken, to be copied
    except (OSError, ValueError) as error:  # ValueError: no path
        say(f"not saved: {atomic.why_refused(error)} ({name})")
