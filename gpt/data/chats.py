"""Reads a chat of one question and one answer, as OpenAI or ShareGPT write it, as an instruction and an output."""

from dataclasses import dataclass
from typing import Any

ROLES = {
    **dict.fromkeys(["user", "human", "prompter"], "instruction"),
    **dict.fromkeys(["assistant", "gpt", "model", "bot", "chatgpt"], "output"),
    **dict.fromkeys(["system", "developer"], "system"),
}
CALLS = ("tool_calls", "function_call")  # of a message that is more than its text
NOTHING = (None, "", [], {})


@dataclass(frozen=True)
class Chat:
    """The two texts that are learned from, and what else its messages have: `system`, `reasoning_content`, ..."""

    instruction: str
    output: str
    others: list[str]


def read(messages: Any) -> Chat | None:
    """A chat of one question and one answer, which a message of the system may accompany; None for another: several
    turns, tools, images, no answer. Raises ValueError for what is no chat."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages: a list of messages is needed")
    turns = [(ROLES.get(_text(message, "role", "from").strip().casefold()), message) for message in messages]
    if [role for role, _ in turns if role != "system"] != ["instruction", "output"] or len(turns) > 3:
        return None
    texts = {role: _content(message) for role, message in turns}
    if None in texts.values() or any(message.get(key) not in NOTHING for _, message in turns for key in CALLS):
        return None
    others = [key for role, message in turns for key in message if role != "system" and message[key] not in NOTHING]
    others = [key for key in others if key not in ("role", "from", "content", "value")]
    return Chat(texts["instruction"], texts["output"], [*others, *(["system"] if texts.get("system") else [])])


def _text(message: Any, *keys: str) -> str:
    for key in keys:
        if isinstance(message, dict) and isinstance(message.get(key), str):
            return message[key]
    raise ValueError(f"messages: a message has no text under {' or '.join(keys)}")


def _content(message: dict[str, Any]) -> str | None:
    """The text of a message, which OpenAI may write in parts; None where something else takes its place."""
    parts = message.get("content")
    if isinstance(parts, list | tuple) and parts:
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    keys = [key for key in ("content", "value") if key in message]
    return None if keys and all(message[key] is None for key in keys) else _text(message, "content", "value")
