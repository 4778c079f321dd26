"""Encoding of a prompt for text generation."""

from __future__ import annotations

from collections.abc import Collection

from loraformat.errors import InputError, UsageError, printable
from loraformat.train.data.chat import ChatRenderer
from loraformat.train.data.template_process import TemplateRefusalError
from loraformat.train.data.tokenizer import TextEncoder

__all__ = ["chat_ids", "plain_ids", "turn_end"]


def plain_ids(encoder: TextEncoder, prompt: str) -> list[int]:
    """Return the tokens of a text that is to be written on from."""
    return [*encoder.prefix, *encoder.tokenize(prompt).ids]


def chat_ids(encoder: TextEncoder, prompt: str, system: str | None = None) -> list[int]:
    """Return the tokens of a user's message that the model is to answer.

    Raises
    ------
    UsageError
        If there is no chat template.
    InputError
        If it refuses the message.
    """
    if not encoder.has_template:
        raise UsageError(
            f"{encoder.name}: its tokenizer has no chat template", hint="leave --chat out"
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return encoder.tokenize(encoder.render(messages, None, prompt=True)).ids
    except TemplateRefusalError as error:
        raise InputError(
            f"its chat template refuses the prompt: {printable(error)}",
            path=encoder.name,
            hint="leave --chat out" if system is None else "try it without --system",
        ) from None


def turn_end(encoder: TextEncoder, stops: Collection[int]) -> str | None:
    """Return the text that the chat template puts behind an answer, where no token ends it.

    Parameters
    ----------
    encoder : TextEncoder
        With a chat template.
    stops : collection of int
        Tokens that end texts.

    Returns
    -------
    str or None
        None if such a token is in it, or the template does more than to put pieces around words.
    """
    found = ChatRenderer(encoder).format()
    if found is None:
        return None
    end = found.turn_end
    if not end or set(encoder.tokenize(end).ids) & set(stops):
        return None
    return end
