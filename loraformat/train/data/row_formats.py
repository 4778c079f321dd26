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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraformat.errors import printable
from loraformat.train.data.messages import (
    KindError,
    as_list,
    as_string,
    checked_message,
    from_sharegpt,
    history_turns,
    says_nothing,
    system_message,
    tool_list,
)

__all__ = ["FIELDS", "Completion", "Conversation", "Text", "kind_of", "meaning"]

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
        "history",
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
    wordless : int
        Messages of the assistant's that say nothing, and are not learned therefore.
    """

    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[Any] | None = None
    wordless: int = 0


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
    """Tell whether a row's text holds what the row says last in another way."""
    said = fields[_NEEDED[kind][-1]]
    if isinstance(said, list) and said and isinstance(said[-1], dict):
        said = said[-1].get("content", said[-1].get("value"))
    text = fields["text"]
    return isinstance(said, str) and isinstance(text, str) and said.strip() in text


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
        return Text(as_string(fields, "text"))
    if kind == "prompt and completion":
        return _completion(fields)
    if kind == "messages":
        return _conversation(fields["messages"], fields.get("tools"))
    if kind == "conversations":
        spoken = as_list(fields["conversations"], "conversations")
        turns = [from_sharegpt(turn) for turn in spoken]
        return _conversation(system_message(fields) + turns, fields.get("tools"))
    question = as_string(fields, "instruction")
    if fields.get("input"):
        question += "\n\n" + as_string(fields, "input")
    turns = [
        *system_message(fields),
        *history_turns(fields.get("history")),
        {"role": "user", "content": question},
        {"role": "assistant", "content": as_string(fields, "output")},
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
    return Completion(as_string(fields, "prompt"), as_string(fields, "completion"))


def _conversation(messages: Any, tools: Any) -> Conversation:
    checked = [checked_message(message) for message in as_list(messages, "messages")]
    answers = [
        message["role"] == "assistant" and message.pop("weight", 1) != 0 for message in checked
    ]
    learned = [
        answer and not says_nothing(message)
        for answer, message in zip(answers, checked, strict=True)
    ]
    return Conversation(checked, learned, tool_list(tools), sum(answers) - sum(learned))
