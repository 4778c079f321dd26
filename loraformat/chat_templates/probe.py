"""Properties of a chat template, found by rendering trial conversations.

What a template wants, and how it frames a turn (`TemplateTrials`):

- Templates of multimodal models want content as a list of parts.
- Templates without a generation prompt write a header before the assistant's words
  ("ASSISTANT: "): what two renderings with different answers have in common.
- Templates that ask for an answer after every message, wanted or not (Llama 3's first one), end a
  conversation with the header of a turn that nobody takes: between two turns of a longer trial
  stands what ends the first and begins the second, and the second's beginning is what the text
  begins with.
- A call of a tool has no text. Some templates write it only if ``content`` is ``None``, others
  fail on ``None`` or print it. Arguments are objects for those that write them as JSON, and
  strings for those that take them as they come. The first form in which name, argument and value
  of a trial call are all written is the template's; a form that two ways lead to is left alone.

The pieces that it puts around each message (`chat_format`): a conversation of one turn shows what
stands before the question and between question and answer; one of two turns, what stands behind
the answer, and that nothing else is different. A template that writes a first turn otherwise than
later ones (with a system prompt of its own, for example) has no such pieces. What the template adds
for a system prompt is what a question with one has more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from loraformat.chat_templates.process import TemplateRefusalError, on_one_day, shared
from loraformat.runtimes.chat import ChatFormat

__all__ = [
    "CALLS",
    "CallForm",
    "TemplateTrials",
    "chat_format",
    "common_prefix",
    "common_suffix",
    "format_of_template",
]

#: ``(messages, prompt) -> text``; raises TemplateRefusalError.
Render = Callable[[list[dict[str, Any]], bool], str]

#: A message's member that holds the calls of tools.
CALLS = "tool_calls"
# Nothing that a template trims, or that a tokenizer could hold for something else.
_ASKED, _SAID, _MORE, _SYSTEM = "Xask1X", "Xsay1X", "Xask2X", "Xsys1X"
_NAME, _KEY, _VALUE = "xname", "xkey", "xvalue"
_ABSENT = object()
_CONTENTS = (None, "", _ABSENT)


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants a message that calls a tool and says nothing else.

    `content` is what stands in the member of that name, if it `has_content`; `arguments` are wanted
    as "object", "string" or "either".
    """

    content: str | None
    has_content: bool
    arguments: str

    def applied(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in this form, if there is no other word in it."""
        if message.get("content"):
            return message
        rest = {name: value for name, value in message.items() if name != "content"}
        return rest | ({"content": self.content} if self.has_content else {})


class TemplateTrials:
    """Trials of one template.

    `render` takes messages as they stand, and whether to write a generation prompt too; `special`
    are texts of special tokens.
    """

    def __init__(self, render: Render, special: Iterable[str]) -> None:
        self._plain = render
        self._special = tuple(token for token in special if token)
        self.as_parts = self.mute = False
        says = self._says_what_is_said()
        self.as_parts = True
        if says or not self._says_what_is_said():
            self.as_parts, self.mute = False, says is False
        self.header = self._header()
        self.trailer = self._trailer()

    def in_parts(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with what is said as this template wants it."""
        said = message.get("content")
        if not self.as_parts or not isinstance(said, str):
            return message
        return message | {"content": [{"type": "text", "text": said}]}

    @cached_property
    def call_form(self) -> CallForm | None:
        """How it wants calls; None if it does not write them in any form."""
        for content in _CONTENTS:
            written = [kind for kind in ("object", "string") if self._writes_call(content, kind)]
            if written:
                return CallForm(
                    None if content is _ABSENT else content,  # type: ignore[arg-type]
                    content is not _ABSENT, "either" if len(written) == 2 else written[0],
                )  # fmt: skip
        return None

    def render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """Return messages as the template writes them; TemplateRefusalError if it refuses them."""
        return self._plain([self.in_parts(message) for message in messages], prompt)

    def _says_what_is_said(self) -> bool | None:
        """Tell whether trial conversations can be told apart; None if there can be none."""
        try:
            said = self.render(_turns("q", "A"))
            others = (self.render(_turns("q", "x")), self.render(_turns("x", "A")))
        except TemplateRefusalError:  # it wants other messages: each row will say so
            return None
        return said not in others

    def _header(self) -> str:
        try:
            asked = self.render(_turns("q"))
            if self.render(_turns("q"), prompt=True) != asked:
                return ""
            common = common_prefix(self.render(_turns("q", "A")), self.render(_turns("q", "b")))
        except TemplateRefusalError:  # as above
            return ""
        header = common[len(asked) :] if common.startswith(asked) else ""
        # White space alone is no header: "[/INST] answer" begins with a space of the answer's.
        return header if header.strip() else ""

    def _trailer(self) -> str:
        """Return the header that stands behind the last turn; empty if none does."""
        try:
            asked = self.render(_turns(_ASKED))
            if self.render(_turns(_ASKED), prompt=True) != asked:
                return ""
            short = self.render(_turns(_ASKED, _SAID))
            long = self.render(_turns(_ASKED, _SAID, _MORE))
        except TemplateRefusalError:
            return ""
        first, _, behind = short.partition(_SAID)
        between = long.partition(_SAID)[2].partition(_MORE)[0]
        begin = self._aligned(common_suffix(first.partition(_ASKED)[0], between))
        end = between.removesuffix(begin)
        trailer = behind[len(end) :] if behind.startswith(end) else ""
        return trailer if trailer.strip() and asked.endswith(trailer) else ""

    def _aligned(self, text: str) -> str:
        """Leave out the end of a special token with which a text begins by chance."""
        cuts = [
            size
            for token in self._special
            for size in range(1, len(token))
            if text.startswith(token[-size:])
        ]
        whole = text.startswith(self._special)
        return text if whole or not cuts else text[max(cuts) :]

    def _writes_call(self, content: object, kind: str) -> bool:
        arguments: Any = {_KEY: _VALUE} if kind == "object" else f'{{"{_KEY}": "{_VALUE}"}}'
        function = {"name": _NAME, "arguments": arguments}
        call = {"role": "assistant", "content": content,
                CALLS: [{"id": "xcall0001", "type": "function", "function": function}]}  # fmt: skip
        if content is _ABSENT:
            del call["content"]
        try:
            text = self.render([*_turns("q"), call])
            without = self.render(_turns("q"))
        except TemplateRefusalError:
            return False
        if content is None and text.count("None") > without.count("None"):
            return False
        doubled = re.search(rf"""\\"{_KEY}|'{_KEY}'""", text)  # JSON in JSON, or Python's own
        return all(word in text for word in (_NAME, _KEY, _VALUE)) and not doubled


def _turns(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def chat_format(trials: TemplateTrials, bos: str | None) -> ChatFormat | None:
    """Return the pieces of a template; None if it has none.

    `bos` is the first token, which runtimes put before a text by themselves.
    """
    try:
        asked = _asked(trials, bos, ("user", _ASKED))
        long = _asked(trials, bos, ("user", _ASKED), ("assistant", _SAID), ("user", _MORE))
    except TemplateRefusalError:
        return None
    before, found, answer = asked.partition(_ASKED)
    start, finish = f"{before}{_ASKED}{answer}", f"{before}{_MORE}{answer}"
    head, said, tail = long.partition(_SAID)
    # White space before an answer is the answer's: "[/INST] answer".
    fits = found and said and head.startswith(start) and not head[len(start) :].strip()
    if not fits or not tail.endswith(finish) or _ASKED in tail or answer.count(_ASKED):
        return None
    end = tail[: len(tail) - len(finish)]
    begin, system, user = _system(trials, bos, before, answer)
    return ChatFormat(begin, system, user, answer, end)


def format_of_template(template: str, special: Mapping[str, str]) -> ChatFormat | None:
    """Return the pieces of a template that no tokenizer is opened for.

    None if it has none, or if transformers, which renders it, is not installed. `template` is
    Jinja; `special` are texts of special tokens by kind: ``bos``, ``eos``, ...

    Raises
    ------
    InputError
        If it takes more than its share of time or memory.
    """
    if find_spec("transformers") is None:
        return None
    tokens = {f"{kind}_token": text for kind, text in special.items()}

    def render(messages: list[dict[str, Any]], prompt: bool) -> str:
        return shared().render(on_one_day(template), messages, prompt=prompt, tokens=tokens)

    trials = TemplateTrials(render, special.values())
    return None if trials.mute else chat_format(trials, special.get("bos"))


def _system(
    trials: TemplateTrials, bos: str | None, before: str, answer: str
) -> tuple[str, tuple[str, str] | None, str]:
    """Return what stands before, around and behind a system's words, up to the question."""
    nothing = "", None, before
    try:
        told = _asked(trials, bos, ("system", _SYSTEM), ("user", _ASKED))
    except TemplateRefusalError:
        return nothing
    lead = told.removesuffix(_ASKED + answer)
    begin = common_prefix(before, lead)
    rest = before[len(begin) :]
    if lead == told or not lead.endswith(rest) or len(lead) < len(before):
        return nothing
    system = lead[len(begin) : len(lead) - len(rest)]
    # "<|im_start|>" begins both a system's words and the question: it belongs to what follows.
    if begin and system.endswith(begin):
        begin, system, rest = "", begin + system.removesuffix(begin), begin + rest
    around = system.split(_SYSTEM)
    return (begin, (around[0], around[1]), rest) if len(around) == 2 else nothing


def _asked(trials: TemplateTrials, bos: str | None, *turns: tuple[str, str]) -> str:
    messages: list[dict[str, Any]] = [{"role": role, "content": said} for role, said in turns]
    text = trials.render(messages, prompt=True) + trials.header
    return text.removeprefix(bos) if bos else text


def common_prefix(one: str, other: str) -> str:
    """Return what both begin with.

    Examples
    --------
    >>> common_prefix("a turn", "a tool")
    'a t'
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return one[:low]


def common_suffix(one: str, other: str) -> str:
    """Return what both end with.

    Examples
    --------
    >>> common_suffix("<s>USER: ", "</s>USER: ")
    's>USER: '
    """
    return common_prefix(one[::-1], other[::-1])[::-1]
