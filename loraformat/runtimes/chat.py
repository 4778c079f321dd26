"""Prompt format and stop tokens of adapters trained on conversations.

A training record says it, under ``training`` and ``chat``: the pieces that the chat template puts
around what people say, and the tokens that were learned to end turns. From the pieces follows the
template in the language of Go that Ollama wants, without anybody having to run Jinja again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["GENERATION_NAME", "RECORD_NAME", "Chat", "ChatFormat", "chat_of"]

RECORD_NAME = "training_record.json"
"""What is to be known of a training."""
GENERATION_NAME = "generation_config.json"
"""Where transformers keeps which tokens end a text."""

_LONGEST = 4096
_MOST_STOPS = 16
_MOST_SOURCES = 64


@dataclass(frozen=True, slots=True)
class ChatFormat:
    r"""Text around the turns of a conversation: system, user and assistant.

    Attributes
    ----------
    begin : str
        Of each turn.
    system : tuple of (str, str) or None
        What stands around a system's words, behind `begin`; None if there is no place for them.
    user : str
        Before the question.
    answer : str
        Between question and answer.
    end : str
        Behind the answer.

    Examples
    --------
    >>> ChatFormat("", ("<s>", "</s>\n"), "USER: ", "\nMODEL: ", "\n").ollama()
    '{{ if .System }}<s>{{ .System }}</s>\n{{ end }}USER: {{ .Prompt }}\nMODEL: {{ .Response }}\n'
    """

    begin: str
    system: tuple[str, str] | None
    user: str
    answer: str
    end: str

    @property
    def turn_end(self) -> str:
        """Text that ends an answer; empty if there is none.

        White space alone may be within an answer: with it goes what begins the next question.
        """
        end = self.end if self.end.strip() else f"{self.end}{self.begin}{self.user}"
        return end.strip()

    def ollama(self) -> str | None:
        """Return the template for a Modelfile; None if it cannot be quoted there."""
        system = ""
        if self.system is not None:
            before, behind = map(_literal, self.system)
            system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ end }}}}"
        text = (
            f"{_literal(self.begin)}{system}{_literal(self.user)}{{{{ .Prompt }}}}"
            f"{_literal(self.answer)}{{{{ .Response }}}}{_literal(self.end)}"
        )
        return None if '"""' in text else text

    @classmethod
    def from_json(cls, value: Any) -> ChatFormat | None:
        """Return the format from its fields as JSON; None for anything else."""
        if not isinstance(value, Mapping):
            return None
        pieces = [value.get(name) for name in ("begin", "user", "answer", "end")]
        system = value.get("system")
        around = [] if system is None else system
        if not isinstance(around, (list, tuple)) or len(around) not in (0, 2):
            return None
        texts = [piece for piece in (*pieces, *around) if isinstance(piece, str)]
        if len(texts) != 4 + len(around) or not all(map(_is_plain, texts)):
            return None
        begin, user, answer, end = texts[:4]
        return cls(begin, (texts[4], texts[5]) if around else None, user, answer, end)


@dataclass(frozen=True, slots=True)
class Chat:
    """Prompt format of an adapter.

    Attributes
    ----------
    format : ChatFormat or None
        None where a template does more than to put pieces around words, or is not known.
    stops : tuple of str
        Texts of the tokens that end a turn.
    stop_ids : tuple of int
        Their numbers, if the base does not stop at all of them by itself.
    template : str or None
        Where the adapter's own chat template lies, if it is not the base's.
    """

    format: ChatFormat | None = None
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    template: str | None = None

    @property
    def stop_text(self) -> str | None:
        """Text that ends an answer, if no token does.

        Examples
        --------
        >>> pieces = ChatFormat("", None, "Q: ", "A: ", "</turn>")
        >>> Chat(pieces).stop_text, Chat(pieces, ("</turn>",)).stop_text
        ('</turn>', None)
        """
        end = "" if self.format is None else self.format.turn_end
        return None if not end or any(stop in end for stop in self.stops) else end


def chat_of(
    record: Mapping[str, Any], *, template: str | None = None, ends_otherwise: bool = False
) -> Chat | None:
    """Return the chat format of an adapter; None if it has none or it is unknown.

    `record` is its training record: any JSON, a stranger's; `template` says where its own chat
    template lies, and `ends_otherwise` that it brings a generation config with ends of turns.

    Examples
    --------
    >>> chat_of({"training": {"chat": {"stops": ["<|im_end|>"], "stop_ids": [7]}}}).stops
    ('<|im_end|>',)
    >>> chat_of({}) is None
    True
    """
    said = _told(record)
    if said is None:
        return Chat(template=template) if template else None
    listed, numbers = said.get("stops"), said.get("stop_ids")
    stops = [s for s in listed if isinstance(s, str)] if isinstance(listed, list) else []
    ids = [n for n in numbers if type(n) is int] if isinstance(numbers, list) else []
    return Chat(
        ChatFormat.from_json(said.get("format")),
        tuple(s for s in stops if s and s.isprintable())[:_MOST_STOPS],
        tuple(ids)[:_MOST_STOPS] if ends_otherwise else (),
        template,
    )


def _told(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the chat format in a training record, or the one shared by all source adapters."""
    told = record.get("training")
    if isinstance(told, Mapping):
        said = told.get("chat")
        return said if isinstance(said, Mapping) else None
    older = record.get("derived_from")
    listed = older if isinstance(older, list) else []
    found = [_told(one) for one in listed[:_MOST_SOURCES] if isinstance(one, Mapping)]
    return found[0] if found and all(one == found[0] for one in found) else None


def _literal(text: str) -> str:
    """Return text quoted for Go's template language."""
    return text.replace("{{", '{{ "{{" }}')


def _is_plain(text: str) -> bool:
    return len(text) <= _LONGEST and all(c.isprintable() or c in "\n\t" for c in text)
