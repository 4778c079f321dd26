"""Which characters of a rendered conversation are the assistant's, by rendering prefixes of it.

What the assistant writes in turn i is what the template adds between

    b = render(messages before i, with the generation prompt)
    a = render(messages up to and with i)

which needs a to begin with b: then the model is asked in training exactly as later in use.
The words of a message are never looked for in the text, and the template needs no
``{% generation %}`` marks.

A template may write earlier turns differently once others follow, as those do that leave
out old reasoning. Then a is not the beginning of the whole conversation, and there is no
single text in which each turn reads as the model wrote it. Such a conversation becomes one
sample per assistant turn, each rendered as it stood when that turn was written. If all that
the whole lacks of a is a special token behind the end of the turn, such as an EOS that is
written once at the very end, the turn itself reads the same, and one sample it stays.

What the assistant says before anybody asked has no such b where a template takes no empty
conversation; it begins where two renderings with different words part.

What a template wants, and how it frames a turn, is found by trial conversations
(`loraformat.chat_templates.probe`).

A template that has no place for a role, for calls or for descriptions of tools leaves them out
silently. A row of which nothing would be learned where something was said is refused, and other
things are counted. So each kind of field that messages hold is tried once, in the first
conversation that has it: if the text stays the same when the field is another, it is not rendered.
A kind is a role with the members that a message has, at the beginning of a conversation or later,
since templates may write a call only where there is no content, or a system prompt only at the
beginning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loraformat.chat_templates.probe import TemplateTrials, chat_format, common_prefix
from loraformat.chat_templates.process import TemplateRefusalError
from loraformat.errors import printable
from loraformat.runtimes.chat import ChatFormat
from loraformat.train.data.row_formats import CALLS, REASONING, Conversation, KindError, from_json
from loraformat.train.data.tokenizer import TextEncoder

__all__ = ["ChatRenderer"]

_OTHER_TEMPLATE = "choose another template with --chat-template"


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A rendered conversation; `learned` are ranges of characters that the assistant wrote.

    `unwritten` names what the row says and the template leaves out, once for each time.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    unwritten: tuple[str, ...] = ()


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._special = tuple(encoder.special_tokens)
        self._unwritten = _UnwrittenParts(lambda messages, tools: self._render(messages, tools))

    @cached_property
    def _trials(self) -> TemplateTrials:
        return TemplateTrials(
            lambda messages, prompt: self._encoder.render(messages, None, prompt=prompt),
            self._special,
        )

    def render(self, conversation: Conversation, *, everything: bool) -> list[_Rendered]:
        """Render one conversation: one sample, or one for each answer if old turns are rewritten.

        With `everything` all of it is a target, and no prefixes are rendered.

        Raises
        ------
        KindError
            If there is no template, it refuses the conversation, or its generation prompt
            is not how it begins a turn.
        InputError
            If the template takes more than its share of time or memory.
        """
        if not self._encoder.has_template:
            raise KindError(
                "is a conversation, and the model has no chat template; give one with "
                "--chat-template, or write prompt and completion"
            )
        if self._trials.mute:
            raise KindError(f"the chat template leaves out what messages say; {_OTHER_TEMPLATE}")
        conversation = replace(
            conversation, messages=[self._formed(one) for one in conversation.messages]
        )
        whole = self._text(conversation, len(conversation.messages), prompt=False)
        unwritten = tuple(self._left_out(conversation))
        if everything:
            end = len(whole.removesuffix(self._trials.trailer))
            return [_Rendered(whole, ((0, end),), unwritten)]
        turns = [i for i, learned in enumerate(conversation.learned) if learned]
        ranges: list[tuple[int, int]] = []
        alone: list[_Rendered] = []
        for turn in turns:
            after = self._text(conversation, turn + 1, prompt=False)
            after = after.removesuffix(self._trials.trailer)
            begin = self._begin(conversation, turn, after)
            if (stop := self._end(after, whole)) is not None:
                ranges.append((begin, stop))
            alone.append(_Rendered(after, ((begin, len(after)),), () if alone else unwritten))
        if len(ranges) == len(turns):
            return [_Rendered(whole, tuple(ranges), unwritten)]
        return alone

    def shape(self) -> str | None:
        """Return one turn as the template writes it, with braces for what people say.

        None if it writes none from a question and an answer alone.
        """
        turn = [
            {"role": "user", "content": "{prompt}"},
            {"role": "assistant", "content": "{completion}"},
        ]
        try:
            (rendered,) = self.render(Conversation(turn, [False, True]), everything=True)
        except KindError:
            return None
        return rendered.text

    def format(self) -> ChatFormat | None:
        """Return the pieces that the template puts around words; None if it does more than that."""
        if not self._encoder.has_template or self._trials.mute:
            return None
        return chat_format(self._trials, self._encoder.tokenizer.bos_token)

    def _end(self, after: str, whole: str) -> int | None:
        """Return where a turn ends in the whole text, or None if it is not in it."""
        if whole.startswith(after):
            return len(after)
        after = after.rstrip()
        lacking = next((token for token in self._special if after.endswith(token)), "")
        turn = after.removesuffix(lacking)
        ended = bool(lacking) and turn.rstrip().endswith(self._special)
        return len(turn) if ended and whole.startswith(turn) else None

    def _begin(self, conversation: Conversation, turn: int, after: str) -> int:
        try:
            before = self._text(conversation, turn, prompt=True) + self._trials.header
        except KindError:
            before = None
        if before is not None and after.startswith(before):
            return len(before)
        if not any(one["role"] == "user" for one in conversation.messages[:turn]):
            return self._begin_unasked(conversation, turn, after)
        before = before or self._text(conversation, turn, prompt=True)
        common = common_prefix(before, after)
        raise KindError(
            f"message {turn + 1}: the chat template asks for it with "
            f"{before[len(common) :][:60]!r}, but writes {after[len(common) :][:60]!r}, so what is "
            "asked for is not what would be learned; let answers begin as it asks (with their "
            f"reasoning), or {_OTHER_TEMPLATE}"
        )

    def _begin_unasked(self, conversation: Conversation, turn: int, after: str) -> int:
        """Return where an answer without a question begins: where another answer would differ."""
        message = conversation.messages[turn]
        said = message["content"] or ""
        others = [
            replace(conversation, messages=[
                *conversation.messages[:turn], message | {"content": other + said}
            ])
            for other in ("Xa", "Yb")
        ]  # fmt: skip
        texts = [self._text(other, turn + 1, prompt=False) for other in others]
        return len(common_prefix(common_prefix(*texts), after))

    def _left_out(self, conversation: Conversation) -> list[str]:
        """Return what the template does not write; refuse a row whose answers are among it."""
        messages, tools = conversation.messages, conversation.tools
        found = []
        for place, message in enumerate(messages):
            for name in self._unwritten.of_message(messages, place, tools):
                role = printable(message["role"][:40])
                what = f"{'messages' if name == 'content' else name} of the role {role}"
                if conversation.learned[place] and name in ("content", CALLS):
                    beside = " of a message that also says something" if message["content"] else ""
                    beside = beside if name == CALLS else ""
                    raise KindError(
                        f"message {place + 1}: the chat template does not write {what}{beside}, so "
                        f"that something else would be learned; {_OTHER_TEMPLATE}, or give the "
                        'message "weight": 0'
                    )
                found.append(what)
        if self._unwritten.of_tools(messages, tools):
            found.append("descriptions of tools")
        return found

    def _formed(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its calls in the form in which the template writes them."""
        form = self._trials.call_form if CALLS in message else None
        if form is None:
            return message
        calls = [
            call | {"function": call["function"] | {
                "arguments": _arguments(call["function"].get("arguments", {}), form.arguments)
            }}
            for call in message[CALLS]
        ]  # fmt: skip
        return form.applied(message | {CALLS: calls})

    def _text(self, conversation: Conversation, stop: int, *, prompt: bool) -> str:
        try:
            return self._render(conversation.messages[:stop], conversation.tools, prompt=prompt)
        except TemplateRefusalError as error:
            shown = "" if stop == len(conversation.messages) else f" its first {stop} messages"
            roles = [one["role"] for one in conversation.messages if one["role"] != "system"]
            first = "; the assistant speaks first: leave that message out, or name another template"
            hint = first if roles[:1] == ["assistant"] else ""
            raise KindError(f"the chat template rejects{shown}: {printable(error)}{hint}") from None

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        parts = [self._trials.in_parts(message) for message in messages]
        return self._encoder.render(parts, tools, prompt=prompt)


def _arguments(given: Any, wanted: str) -> Any:
    """Return a call's arguments as the object or the JSON string that the template needs."""
    if wanted == "object" and isinstance(given, str):
        found = from_json(given, "arguments") if given.strip() else {}
        if not isinstance(found, dict):
            raise KindError('"arguments" of a call are a string of JSON, and not of an object')
        return found
    if wanted == "string" and not isinstance(given, str):
        return json.dumps(given, ensure_ascii=False)
    return given


#: ``(messages, tools) -> text``; raises TemplateRefusalError.
Render = Callable[[list[dict[str, Any]], "list[Any] | None"], str]

#: Roles come from untrusted data: beyond this many kinds no more are tried.
_MOST_KINDS = 256
_OTHER = "Xq7"


class _UnwrittenParts:
    """Fields of a conversation that its chat template does not render, found by trials."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._written: dict[tuple[object, ...], bool] = {}

    def of_message(
        self, messages: list[dict[str, Any]], place: int, tools: list[Any] | None
    ) -> list[str]:
        """Name what of a message is not written: ``content``, ``tool_calls`` or reasoning."""
        message = messages[place]
        has = [name for name in ("content", CALLS, *REASONING) if message.get(name)]
        lacking = []
        for name in has:
            kind = (message["role"], name, place == 0, *has)
            if kind not in self._written and len(self._written) < _MOST_KINDS:
                self._written[kind] = all(
                    self._differs(messages, place, message | {name: other}, tools)
                    for other in _others(message[name])
                )
            if not self._written.get(kind, True):
                lacking.append(name)
        return lacking

    def of_tools(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        """Tell whether there are descriptions of tools that are not written."""
        if not tools:
            return False
        if (kind := ("tools",)) not in self._written:
            other = self._text(messages, _renamed(tools))
            self._written[kind] = self._text(messages, tools) != other
        return not self._written[kind]

    def _differs(
        self, messages: list[dict[str, Any]], place: int, other: dict[str, Any],
        tools: list[Any] | None,
    ) -> bool:  # fmt: skip
        """Tell whether another message renders differently, in the whole or up to it."""
        others = [*messages[:place], other, *messages[place + 1 :]]
        # Many templates render reasoning only until the next user turn.
        for stop in sorted({place + 1, len(messages)}, reverse=True):
            before, after = self._text(messages[:stop], tools), self._text(others[:stop], tools)
            if before is not None and before != after:
                return True
        return False

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
        try:
            return self._render(messages, tools)
        except TemplateRefusalError:
            return None


def _others(value: Any) -> Iterator[Any]:
    """Yield a value otherwise: each of them must make a difference."""
    if isinstance(value, str):
        yield value + _OTHER
        return
    called = [call["function"] for call in value]
    renamed = [one | {"name": one["name"] + _OTHER} for one in called]
    reargued = [one | {"arguments": _argued(one.get("arguments", {}))} for one in called]
    for changed in (renamed, reargued):
        yield [call | {"function": one} for call, one in zip(value, changed, strict=True)]


def _argued(arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return arguments | {_OTHER: _OTHER}
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments + _OTHER
    return json.dumps(found | {_OTHER: _OTHER}) if isinstance(found, dict) else arguments + _OTHER


def _renamed(value: Any) -> Any:
    """Return descriptions of tools in which everything that has a name has another."""
    if isinstance(value, list):
        return [_renamed(one) for one in value]
    if isinstance(value, dict):
        return {
            key: one + _OTHER if key == "name" and isinstance(one, str) else _renamed(one)
            for key, one in value.items()
        }
    return value
