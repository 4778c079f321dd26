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
sample per assistant turn, each rendered as it stood when that turn was written.

Templates without a generation prompt that write a header before the assistant's words
("ASSISTANT: ") are recognized by a trial conversation: the header is what two renderings
with different answers have in common, and is not learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraformat.train.data.kinds import Conversation, KindError
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
        self._header = self._find_header() if encoder.has_template else ""

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
        """
        if not self._encoder.has_template:
            raise KindError(
                "is a conversation, and the model has no chat template; "
                "name one with --chat-template, or write prompt and completion"
            )
        whole = self._text(conversation, len(conversation.messages), prompt=False)
        if everything:
            return [Rendered(whole, ((0, len(whole)),))]
        turns = [i for i, learned in enumerate(conversation.learned) if learned]
        ranges, rewritten = [], []
        for turn in turns:
            after = self._text(conversation, turn + 1, prompt=False)
            begin = self._begin(conversation, turn, after)
            ranges.append((begin, len(after)))
            rewritten.append(Rendered(after, ((begin, len(after)),)))
        if all(whole.startswith(one.text) for one in rewritten):
            return [Rendered(whole, tuple(ranges))]
        return rewritten

    def _begin(self, conversation: Conversation, turn: int, after: str) -> int:
        before = self._text(conversation, turn, prompt=True) + self._header
        if after.startswith(before):
            return len(before)
        common = _common(before, after)
        raise KindError(
            f"message {turn + 1}: the chat template asks for it with "
            f"{before[len(common) :][:60]!r}, but writes {after[len(common) :][:60]!r}; "
            "what the model is asked for is not what would be learned"
        )

    def _text(self, conversation: Conversation, stop: int, *, prompt: bool) -> str:
        try:
            return self._encoder.render(
                conversation.messages[:stop], conversation.tools, prompt=prompt
            )
        except Exception as error:  # jinja2's own, and whatever a template makes of odd messages
            shown = "" if stop == len(conversation.messages) else f" its first {stop} messages"
            raise KindError(f"the chat template refuses{shown}: {error}") from None

    def _find_header(self) -> str:
        def rendered(*contents: str, prompt: bool = False) -> str:
            roles = ("user", "assistant")
            messages: list[dict[str, Any]] = [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=False)
            ]
            return self._encoder.render(messages, None, prompt=prompt)

        try:
            asked = rendered("q")
            if rendered("q", prompt=True) != asked:
                return ""
            common = _common(rendered("q", "A"), rendered("q", "b"))
        except Exception:  # a template that wants other messages: each row will say so
            return ""
        header = common[len(asked) :] if common.startswith(asked) else ""
        # White space alone is no header: "[/INST] answer" begins with a space of the answer's.
        return header if header.strip() else ""


def _common(one: str, other: str) -> str:
    """Return what both begin with."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]
