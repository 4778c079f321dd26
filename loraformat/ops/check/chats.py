"""Prompt format of an adapter, from its training record or its template and tokenizer files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from loraformat.chat_templates.probe import format_of_template
from loraformat.model.checkpoint import CarriedFile
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.check.prompts import tokenizer_beside
from loraformat.runtimes.chat import GENERATION_NAME, RECORD_NAME, Chat, chat_of
from loraformat.runtimes.use import TEMPLATE_NAME
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["chat_beside"]

_LARGEST_RECORD = 16 << 20


def chat_beside(place: Path, base: Path | None) -> Chat | None:
    """Return an adapter's prompt format, from the files in its directory; None for a single file.

    The special tokens of the ``base`` count where the adapter brings no tokenizer.

    Raises
    ------
    InputError
        If a file beside it is damaged.
    """
    if not place.is_dir():
        return None
    folder, record = SafeDirectory(place), {}
    if folder.has(RECORD_NAME):
        read = partial(folder.read, RECORD_NAME, _LARGEST_RECORD)
        file = CarriedFile(RECORD_NAME, folder.size(RECORD_NAME), read)
        record = CarriedTokenizer([file], place).json(RECORD_NAME)
    told = record.get("training")
    if isinstance(told, dict) and told.get("chat", record) is None:
        return None  # the template is the base's, and had no part in the training
    chat = chat_of(
        record,
        template=str(place.absolute() / TEMPLATE_NAME) if folder.has(TEMPLATE_NAME) else None,
        ends_otherwise=folder.has(GENERATION_NAME),
    )
    ours = tokenizer_beside(place)
    template = ours.chat_templates.get("default")
    if template is None or (chat is not None and chat.format is not None):
        return chat
    special = {**({} if base is None else tokenizer_beside(base).special), **ours.special}
    chat = chat or Chat()
    ends = chat.stops or tuple(filter(None, [special.get("eos")]))
    return replace(chat, format=format_of_template(template, special), stops=ends)
