"""What a row means: text, a prompt with its completion, or a conversation.

::

    {"text": "…"}                                       every token is learned
    {"prompt": "…", "completion": "…"}                  the completion is learned
    {"prompt": [{…}], "completion": [{…}]}              the same with messages
    {"messages": [{"role": …, "content": …}, …]}        assistant turns are learned
    {"conversations": [{"from": …, "value": …}, …]}     ShareGPT's spelling of messages
    {"instruction": "…", "input": "…", "output": "…"}   Alpaca's: one question, one answer

Conversations may carry ``tools``, and a ``system`` text beside Alpaca's and ShareGPT's
fields; Alpaca's may have a ``history`` of pairs. An assistant's message with ``"weight": 0`` is
not learned, nor is one that says nothing. Other fields are ignored, and so is a field that is
``null``. A ``text`` beside another kind is passed over if it holds what that kind says last, as
tatsu-lab/alpaca's does; any other row that is two of these at once is an error.

Messages are taken in OpenAI's and ShareGPT's spellings: ``tool_calls``, the older
``function_call``, and ShareGPT's turns of that name; tools and calls as lists or as strings of
JSON. The content of a message is kept as it stands:
``content`` is ``None`` where the row says so, and arguments stay an object or a string.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from loraformat.chat_templates.probe import CALLS
from loraformat.errors import printable
from loraformat.storage import strict_json

__all__ = [
    "CALLS",
    "FIELDS",
    "REASONING",
    "Completion",
    "Conversation",
    "KindError",
    "from_json",
    "kind_of",
    "meaning",
]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Where templates look for what a model thought before it answered."""

_FUNCTION_CALL = "function_call"
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    _FUNCTION_CALL: "assistant",
}  # fmt: skip


class KindError(ValueError):
    """A row that means nothing, or two things."""


def _as_string(fields: dict[str, Any], name: str) -> str:
    """Return a field that must be a string."""
    value = fields[name]
    if not isinstance(value, str):
        raise KindError(f'"{name}" is {_type_name(value)}, wanted a string')
    return value


def _as_list(value: Any, name: str) -> list[Any]:
    """Return a value that must be a list with something in it, or JSON of one."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = from_json(value, name)
    if not isinstance(value, list) or not value:
        raise KindError(
            f'"{name}" is {_type_name(value) if value != [] else "empty"}, wanted a list'
        )
    return value


def from_json(text: str, name: str) -> Any:
    """Return what a string of strict JSON says, as tables keep what differs from row to row.

    Examples
    --------
    >>> from_json('[{"name": "add"}]', "tools")
    [{'name': 'add'}]
    """
    try:
        return strict_json.loads(text.encode("utf-8", "surrogatepass"))
    except strict_json.StrictJsonError as error:
        raise KindError(f'"{name}" is a string, and not strict JSON: {error}') from None


def _type_name(value: Any) -> str:
    """Name a value's type as JSON does."""
    names: dict[type, str] = {
        str: "a string", list: "a list", dict: "an object", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _checked_message(message: Any) -> dict[str, Any]:
    """Return a message with ``role``, ``content`` and what else it has."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise KindError('a message is not an object with a "role"')
    checked = {name: value for name, value in message.items() if value is not None}
    if _FUNCTION_CALL in checked:
        checked.setdefault(CALLS, [checked.pop(_FUNCTION_CALL)])
    if CALLS in checked:
        checked[CALLS] = [_call(call) for call in _several(checked[CALLS], CALLS)]
        if not checked[CALLS]:
            del checked[CALLS]
    content = checked.get("content")
    if isinstance(content, list):
        content = "".join(map(_text_part, content))
    if content is not None and not isinstance(content, str):
        raise KindError(f'"content" of a message is {_type_name(content)}, wanted a string')
    if checked.get("weight", 1) not in (0, 1):
        raise KindError('"weight" of a message is neither 0 nor 1')
    if content is None and CALLS not in checked:
        raise KindError('a message without "content"')
    return {"role": checked["role"], "content": content} | {
        name: value for name, value in checked.items() if name not in ("role", "content")
    }


def _says_nothing(message: dict[str, Any]) -> bool:
    """Tell whether a message has no words, no reasoning and calls no tool."""
    return not any(message.get(name) for name in ("content", CALLS, *REASONING))


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    """Return a turn of ShareGPT's as a message."""
    if isinstance(turn, dict) and "role" in turn:
        return turn
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise KindError('a turn of "conversations" is not an object with "from" and "value"')
    role = _SHAREGPT_ROLES.get(turn["from"])
    if role is None:
        raise KindError(
            f'"from" is {turn["from"][:40]!r}, wanted one of {", ".join(_SHAREGPT_ROLES)}'
        )
    message = {"role": role, "content": turn.get("value")}
    if turn["from"] == _FUNCTION_CALL:
        message = {"role": role, "content": None, CALLS: turn.get("value")}
    return message | ({"weight": turn["weight"]} if turn.get("weight") is not None else {})


def _history_turns(history: Any) -> list[dict[str, Any]]:
    """Return Alpaca's ``history``, pairs of question and answer, as messages."""
    if not history:
        return []
    turns = []
    for pair in _as_list(history, "history"):
        if not isinstance(pair, list) or [type(said) for said in pair] != [str, str]:
            raise KindError('"history" is not a list of pairs of question and answer')
        question, answer = pair
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _system_message(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the message that a row's ``system`` is, if there is one."""
    if not fields.get("system"):
        return []
    return [{"role": "system", "content": _as_string(fields, "system")}]


def _several(value: Any, name: str) -> list[Any]:
    """Return one or several things from a list, an object, or a string of their JSON."""
    if isinstance(value, str):
        value = from_json(value, name) if value.strip() else None
    if isinstance(value, dict):
        value = [value]
    return _as_list(value, name) if value else []


def _call(call: Any) -> dict[str, Any]:
    """Return a call as ``{"type": "function", "function": {"name": …, "arguments": …}}``."""
    if isinstance(call, dict) and "function" not in call and "name" in call:
        alone = {"name": call["name"], "arguments": call.get("arguments", {})}
        call = {"type": "function", "function": alone}
    found = call.get("function") if isinstance(call, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise KindError('a call of "tool_calls" is not an object with a "function" and its "name"')
    arguments = found.get("arguments", {})
    if not isinstance(arguments, (str, dict)):
        raise KindError(
            f'"arguments" of a call are {_type_name(arguments)}, wanted an object or a string'
        )
    return {"type": "function", **call}


def _text_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise KindError('a part of a "content" that is not text')
    return text


_NEEDED = {
    "text": ("text",),
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction and output": ("instruction", "output"),
}
FIELDS = frozenset(chain(*_NEEDED.values(), ("input", "system", "history", "tools")))
"""Every field that means something."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what is to follow it, put behind each other as they are."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, with ``role`` and ``content``, and descriptions of tools for the chat template.

    `learned` tells of each message whether it is. `wordless` counts those of the assistant's that
    say nothing, and are not learned therefore.
    """

    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[Any] | None = None
    wordless: int = 0


def kind_of(fields: dict[str, Any]) -> str:
    """Name the fields that say what a row is; KindError if there are none, or those of two kinds.

    Examples
    --------
    >>> kind_of({"prompt": "2 + 2 = ", "completion": "4", "id": 7})
    'prompt and completion'
    """
    present = {name for name, value in fields.items() if value is not None}
    kinds = [kind for kind, needed in _NEEDED.items() if present.issuperset(needed)]
    if not kinds:
        found = printable(", ".join(sorted(present)[:8])) or "nothing"
        raise KindError(
            f"fields {found}; wanted text, prompt and completion, messages, conversations, "
            "or instruction and output"
        )
    if len(kinds) > 1 and kinds[0] == "text" and _retold(fields, kinds[1]):
        kinds = kinds[1:]
    if len(kinds) > 1:
        raise KindError(f"has the fields of two kinds of row: {', and '.join(kinds)}; keep one")
    return kinds[0]


def _retold(fields: dict[str, Any], kind: str) -> bool:
    """Tell whether a row's ``text`` repeats what its other fields end with."""
    said = fields[_NEEDED[kind][-1]]
    if isinstance(said, list) and said and isinstance(said[-1], dict):
        said = said[-1].get("content", said[-1].get("value"))
    text = fields["text"]
    return isinstance(said, str) and isinstance(text, str) and said.strip() in text


def meaning(fields: dict[str, Any]) -> str | Completion | Conversation:
    r"""Return what a row means, a document being its text; KindError if a field is wrong.

    Examples
    --------
    >>> meaning({"instruction": "Add.", "input": "2, 2", "output": "4"}).messages[0]
    {'role': 'user', 'content': 'Add.\n\n2, 2'}
    """
    kind = kind_of(fields)
    if kind == "text":
        return _as_string(fields, "text")
    if kind == "prompt and completion":
        return _completion(fields)
    if kind == "messages":
        return _conversation(fields["messages"], fields.get("tools"))
    if kind == "conversations":
        spoken = _as_list(fields["conversations"], "conversations")
        turns = [_from_sharegpt(turn) for turn in spoken]
        return _conversation(_system_message(fields) + turns, fields.get("tools"))
    question = _as_string(fields, "instruction")
    if fields.get("input"):
        question += "\n\n" + _as_string(fields, "input")
    turns = [
        *_system_message(fields),
        *_history_turns(fields.get("history")),
        {"role": "user", "content": question},
        {"role": "assistant", "content": _as_string(fields, "output")},
    ]
    return _conversation(turns, fields.get("tools"))


def _completion(fields: dict[str, Any]) -> Completion | Conversation:
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        asked = _conversation(fields["prompt"], fields.get("tools"))
        answered = _conversation(fields["completion"], None)
        learned = [False] * len(asked.messages) + answered.learned
        return Conversation(
            asked.messages + answered.messages, learned, asked.tools, answered.wordless
        )
    return Completion(_as_string(fields, "prompt"), _as_string(fields, "completion"))


def _conversation(messages: Any, tools: Any) -> Conversation:
    checked = [_checked_message(message) for message in _as_list(messages, "messages")]
    answers = [
        message["role"] == "assistant" and message.pop("weight", 1) != 0 for message in checked
    ]
    learned = [
        answer and not _says_nothing(message)
        for answer, message in zip(answers, checked, strict=True)
    ]
    wordless = sum(answers) - sum(learned)
    return Conversation(checked, learned, _several(tools, "tools") or None, wordless)
