"""Fields of a conversation that its chat template does not render, found by varying them.

A template that has no place for a role, for calls or for descriptions of tools leaves them out
silently. So each kind of field that messages hold is tried once, in the first conversation that
has it: if the text stays the same when the field is another, it is not rendered. A kind is a role
with the members that a message has, at the beginning of a conversation or later, since templates
may write a call only where there is no content, or a system prompt only at the beginning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from loraformat.chat_templates.process import TemplateRefusalError
from loraformat.errors import printable
from loraformat.train.data.messages import CALLS, REASONING

__all__ = ["UnwrittenParts", "described"]

#: ``(messages, tools) -> text``; raises TemplateRefusalError.
Render = Callable[[list[dict[str, Any]], "list[Any] | None"], str]

#: Roles are a stranger's words: whoever has more of them is not tried any further.
_MOST_KINDS = 256
_OTHER = "Xq7"


class UnwrittenParts:
    """Trials of one template on the rows themselves.

    Parameters
    ----------
    render : callable
        Messages and tools to text, without a generation prompt.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._written: dict[tuple[object, ...], bool] = {}

    def of_message(
        self, messages: list[dict[str, Any]], place: int, tools: list[Any] | None
    ) -> list[str]:
        """Name what of a message is not written: ``content``, ``tool_calls`` or reasoning.

        Parameters
        ----------
        messages : list of dict
            A whole conversation.
        place : int
            Of the message in it.
        tools : list or None
        """
        message = messages[place]
        has = [name for name in ("content", CALLS, *REASONING) if message.get(name)]
        lacking = []
        for name in has:
            kind = (message["role"], name, place == 0, *has)
            if kind not in self._written and len(self._written) < _MOST_KINDS:
                others = [
                    [*messages[:place], message | {name: other}, *messages[place + 1 :]]
                    for other in _others(message[name])
                ]
                self._written[kind] = all(
                    self._differs(messages, other, place, tools) for other in others
                )
            if not self._written.get(kind, True):
                lacking.append(name)
        return lacking

    def of_tools(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        """Tell whether there are descriptions of tools that are not written."""
        if not tools:
            return False
        if (kind := ("tools",)) not in self._written:
            other = json.loads(json.dumps(tools, default=str))
            _rename(other)
            self._written[kind] = self._text(messages, tools) != self._text(messages, other)
        return not self._written[kind]

    def _differs(
        self, messages: list[dict[str, Any]], others: list[dict[str, Any]], place: int,
        tools: list[Any] | None,
    ) -> bool:  # fmt: skip
        """Tell whether two conversations read otherwise, whole or up to a message of theirs."""
        if self._text(messages, tools) != self._text(others, tools):
            return True
        # Reasoning is often written until somebody answers.
        stop = place + 1
        if stop == len(messages):
            return False
        before, after = self._text(messages[:stop], tools), self._text(others[:stop], tools)
        return before is not None and before != after

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
        try:
            return self._render(messages, tools)
        except TemplateRefusalError:
            return None


def described(role: str, name: str) -> str:
    """Name a kind of thing for people.

    Examples
    --------
    >>> described("developer", "content"), described("assistant", "tool_calls")
    ('messages of the role developer', 'tool_calls of the role assistant')
    """
    what = "messages" if name == "content" else name
    return f"{what} of the role {printable(role[:40])}"


def _others(value: Any) -> Iterator[Any]:
    """Yield a value otherwise: each of them must make a difference."""
    if isinstance(value, str):
        yield value + _OTHER
        return
    for rename in (True, False):
        calls = []
        for call in value:
            function = dict(call["function"])
            if rename:
                function["name"] += _OTHER
            else:
                function["arguments"] = _argued(function.get("arguments", {}))
            calls.append(call | {"function": function})
        yield calls


def _argued(arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return arguments | {_OTHER: _OTHER}
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments + _OTHER
    return json.dumps(found | {_OTHER: _OTHER}) if isinstance(found, dict) else arguments + _OTHER


def _rename(value: Any) -> None:
    """Give everything in descriptions of tools that has a name another."""
    if isinstance(value, list):
        for one in value:
            _rename(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key == "name" and isinstance(one, str):
                value[key] = one + _OTHER
            else:
                _rename(one)
