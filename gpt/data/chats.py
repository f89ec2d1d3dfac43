"""Reads a chat of one question and one answer, as OpenAI or ShareGPT write it, as an instruction and an output."""

from typing import Any

ROLES = {
    **dict.fromkeys(["user", "human", "prompter"], "instruction"),
    **dict.fromkeys(["assistant", "gpt", "model", "bot", "chatgpt"], "output"),
    **dict.fromkeys(["system", "developer"], "system"),
}


def read(messages: Any) -> dict[str, str] | None:
    """The texts of `instruction`, `output` and, where it has one, `system`; None for a chat of another form: several
    turns, tools, no answer. Raises ValueError for what is no chat."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages: a list of messages is needed")
    turns = [(ROLES.get(_text(message, "role", "from").strip().casefold()), message) for message in messages]
    others = [role for role, _ in turns if role != "system"]
    if others != ["instruction", "output"] or len(turns) > 3:
        return None
    return {role: _content(message) for role, message in turns if role}


def _text(message: Any, *keys: str) -> str:
    for key in keys:
        if isinstance(message, dict) and isinstance(message.get(key), str):
            return message[key]
    raise ValueError(f"messages: a message has no text under {' or '.join(keys)}")


def _content(message: Any) -> str:
    """The text of a message; OpenAI may write it in parts."""
    parts = message.get("content")
    if isinstance(parts, list | tuple) and parts:
        return "".join(_text(part, "text") for part in parts)
    return _text(message, "content", "value")
