"""What a row means: text, a prompt with its completion, or a conversation.

::

    {"text": "…"}                                       every token is learned
    {"prompt": "…", "completion": "…"}                  the completion is learned
    {"prompt": [{…}], "completion": [{…}]}              the same with messages
    {"messages": [{"role": …, "content": …}, …]}        assistant turns are learned
    {"conversations": [{"from": …, "value": …}, …]}     ShareGPT's spelling of messages
    {"instruction": "…", "input": "…", "output": "…"}   Alpaca's: one question, one answer

Conversations may carry ``tools``, and a ``system`` text beside Alpaca's and ShareGPT's
fields. An assistant's message with ``"weight": 0`` is not learned. Other fields are
ignored, and so is a field that is ``null``; a row that is two of these at once
is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FIELDS", "Completion", "Conversation", "KindError", "Text", "kind_of", "meaning"]

FIELDS = frozenset(
    [
        "text",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "system",
        "tools",
    ]
)
"""Every field that means something."""

_NEEDED = {
    "text": ("text",),
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction and output": ("instruction", "output"),
}
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip


class KindError(ValueError):
    """A row that means nothing, or two things."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what is to follow it, put behind each other as they are."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template.

    Attributes
    ----------
    messages : list of dict
        At least ``role`` and ``content``.
    learned : list of bool
        For each message whether it is learned.
    tools : list or None
        Descriptions of tools, as the template wants them.
    """

    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[Any] | None = None


def kind_of(fields: dict[str, Any]) -> str:
    """Name the fields that say what a row is; one file holds rows of one kind.

    Raises
    ------
    KindError
        If there are none, or those of two kinds.

    Examples
    --------
    >>> kind_of({"prompt": "2 + 2 = ", "completion": "4", "id": 7})
    'prompt and completion'
    """
    present = {name for name, value in fields.items() if value is not None}
    kinds = [kind for kind, needed in _NEEDED.items() if present.issuperset(needed)]
    if not kinds:
        found = ", ".join(sorted(present)[:8]) or "nothing"
        raise KindError(
            f"fields {found}; wanted text, prompt and completion, messages, conversations, "
            "or instruction and output"
        )
    if len(kinds) > 1:
        raise KindError(f"has the fields of two kinds of row: {', and '.join(kinds)}; keep one")
    return kinds[0]


def meaning(fields: dict[str, Any]) -> Text | Completion | Conversation:
    r"""Return what a row means.

    Raises
    ------
    KindError
        If a field is missing or of a wrong type.

    Examples
    --------
    >>> meaning({"instruction": "Add.", "input": "2, 2", "output": "4"}).messages[0]
    {'role': 'user', 'content': 'Add.\n\n2, 2'}
    """
    kind = kind_of(fields)
    if kind == "text":
        return Text(_string(fields, "text"))
    if kind == "prompt and completion":
        return _completion(fields)
    if kind == "messages":
        return _conversation(fields["messages"], fields.get("tools"))
    if kind == "conversations":
        spoken = _list(fields["conversations"], "conversations")
        turns = [_from_sharegpt(turn) for turn in spoken]
        return _conversation(_system(fields) + turns, fields.get("tools"))
    question = _string(fields, "instruction")
    if fields.get("input"):
        question += "\n\n" + _string(fields, "input")
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(fields, "output")},
    ]
    return _conversation(_system(fields) + turns, None)


def _completion(fields: dict[str, Any]) -> Completion | Conversation:
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        asked = _conversation(fields["prompt"], fields.get("tools"))
        answered = _conversation(fields["completion"], None)
        learned = [False] * len(asked.messages) + answered.learned
        return Conversation(asked.messages + answered.messages, learned, asked.tools)
    return Completion(_string(fields, "prompt"), _string(fields, "completion"))


def _conversation(messages: Any, tools: Any) -> Conversation:
    checked = [_message(message) for message in _list(messages, "messages")]
    if tools is not None:
        tools = _list(tools, "tools")
    learned = [
        message["role"] == "assistant" and message.pop("weight", 1) != 0 for message in checked
    ]
    return Conversation(checked, learned, tools or None)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise KindError('a message is not an object with a "role"')
    checked = {name: value for name, value in message.items() if value is not None}
    content = checked.get("content", "")
    if isinstance(content, list):
        content = "".join(map(_text_part, content))
    if not isinstance(content, str):
        raise KindError(f'"content" of a message is {_name(content)}, wanted a string')
    if checked.get("weight", 1) not in (0, 1):
        raise KindError('"weight" of a message is neither 0 nor 1')
    if "content" not in checked and "tool_calls" not in checked:
        raise KindError('a message without "content"')
    return checked | {"content": content}


def _text_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise KindError('a part of a "content" that is not text')
    return text


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    if isinstance(turn, dict) and "role" in turn:
        return turn
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise KindError('a turn of "conversations" is not an object with "from" and "value"')
    role = _SHAREGPT_ROLES.get(turn["from"])
    if role is None:
        raise KindError(
            f'"from" is {turn["from"][:40]!r}, wanted one of {", ".join(_SHAREGPT_ROLES)}'
        )
    renamed = {"role": role, "content": turn.get("value")}
    return renamed | ({"weight": turn["weight"]} if turn.get("weight") is not None else {})


def _system(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        [{"role": "system", "content": _string(fields, "system")}] if fields.get("system") else []
    )


def _string(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise KindError(f'"{name}" is {_name(value)}, wanted a string')
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise KindError(f'"{name}" is {_name(value) if value != [] else "empty"}, wanted a list')
    return value


def _name(value: Any) -> str:
    names: dict[type, str] = {
        str: "a string", list: "a list", dict: "an object", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
