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

Templates without a generation prompt that write a header before the assistant's words
("ASSISTANT: ") are recognized by a trial conversation: the header is what two renderings
with different answers have in common, and is not learned. The same trial shows whether a
template wants what is said as a list of parts, as those of models that also see do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraformat.errors import printable
from loraformat.train.data.kinds import Conversation, KindError
from loraformat.train.data.template_process import TemplateRefusalError
from loraformat.train.data.tokenizer import TextEncoder

__all__ = ["ChatRenderer", "Rendered"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation.

    Attributes
    ----------
    text : str
    learned : tuple of (int, int)
        Ranges of characters that the assistant wrote.
    """

    text: str
    learned: tuple[tuple[int, int], ...]


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template.

    Parameters
    ----------
    encoder : TextEncoder
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._as_parts, self._mute, self._header = False, False, ""
        if encoder.has_template:
            says = self._says_what_is_said()
            self._as_parts = True
            if says or not self._says_what_is_said():
                self._as_parts = False
                self._mute = says is False
            self._header = self._find_header()
        self._special = tuple(encoder.special_tokens)

    def render(self, conversation: Conversation, *, everything: bool) -> list[Rendered]:
        """Render one conversation.

        Parameters
        ----------
        conversation : Conversation
        everything : bool
            All of it is learned; no prefixes are rendered.

        Returns
        -------
        list of Rendered
            One, or one for each learned turn if the template rewrites earlier turns.

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
                "is a conversation, and the model has no chat template; "
                "name one with --chat-template, or write prompt and completion"
            )
        if self._mute:
            raise KindError("the chat template leaves out what messages say; name another one")
        whole = self._text(conversation, len(conversation.messages), prompt=False)
        if everything:
            return [Rendered(whole, ((0, len(whole)),))]
        turns = [i for i, learned in enumerate(conversation.learned) if learned]
        ranges: list[tuple[int, int]] = []
        alone: list[Rendered] = []
        for turn in turns:
            after = self._text(conversation, turn + 1, prompt=False)
            begin = self._begin(conversation, turn, after)
            if (end := self._end(after, whole)) is not None:
                ranges.append((begin, end))
            alone.append(Rendered(after, ((begin, len(after)),)))
        if len(ranges) == len(turns):
            return [Rendered(whole, tuple(ranges))]
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

    def _end(self, after: str, whole: str) -> int | None:
        """Return where a turn ends in the whole, or None if it does not stand there."""
        if whole.startswith(after):
            return len(after)
        after = after.rstrip()
        lacking = next((token for token in self._special if after.endswith(token)), "")
        turn = after.removesuffix(lacking)
        ended = bool(lacking) and turn.rstrip().endswith(self._special)
        return len(turn) if ended and whole.startswith(turn) else None

    def _begin(self, conversation: Conversation, turn: int, after: str) -> int:
        before = self._text(conversation, turn, prompt=True) + self._header
        if after.startswith(before):
            return len(before)
        common = _common(before, after)
        raise KindError(
            f"message {turn + 1}: the chat template asks for it with "
            f"{before[len(common) :][:60]!r}, but writes {after[len(common) :][:60]!r}, so what is "
            "asked for is not what would be learned; let answers begin as it asks (with their "
            "reasoning), or name another template with --chat-template"
        )

    def _text(self, conversation: Conversation, stop: int, *, prompt: bool) -> str:
        try:
            return self._render(conversation.messages[:stop], conversation.tools, prompt=prompt)
        except TemplateRefusalError as error:
            shown = "" if stop == len(conversation.messages) else f" its first {stop} messages"
            raise KindError(f"the chat template refuses{shown}: {printable(error)}") from None

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        if self._as_parts:
            messages = [
                message | {"content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        return self._encoder.render(messages, tools, prompt=prompt)

    def _says_what_is_said(self) -> bool | None:
        """Tell whether trial conversations can be told apart; None if there can be none."""
        try:
            said = self._render(_trial("q", "A"))
            others = (self._render(_trial("q", "x")), self._render(_trial("x", "A")))
        except TemplateRefusalError:  # it wants other messages: each row will say so
            return None
        return said not in others

    def _find_header(self) -> str:
        try:
            asked = self._render(_trial("q"))
            if self._render(_trial("q"), prompt=True) != asked:
                return ""
            common = _common(self._render(_trial("q", "A")), self._render(_trial("q", "b")))
        except TemplateRefusalError:  # as above
            return ""
        header = common[len(asked) :] if common.startswith(asked) else ""
        # White space alone is no header: "[/INST] answer" begins with a space of the answer's.
        return header if header.strip() else ""


def _trial(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def _common(one: str, other: str) -> str:
    """Return what both begin with."""
    shorter = min(len(one), len(other))
    low, high = 0, shorter
    while low < high:  # equality of slices is compared in C, characters in Python are not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return one[:low]
