"""The tokenizer and chat template of a model, opened from the model's directory alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from loraformat.chat_templates.process import TemplateRefusalError, on_one_day, shared
from loraformat.errors import (
    InputError,
    LoraFormatError,
    MissingDependencyError,
    UnsupportedError,
    printable,
)
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["TextEncoder", "TokenizedText", "open_tokenizer"]

_LARGEST_TEMPLATE = 1 << 20
_PROBE = "a"


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text as token ids, and the characters of it that each token stands for."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


class TextEncoder:
    """What the data needs of a tokenizer of transformers, a fast one; `name` is for messages.

    Attributes
    ----------
    special, special_tokens : frozenset of int, of str
        Ids and texts of tokens such as EOS and end of turn.
    prefix : list of int
        What the tokenizer puts before a text by itself, such as BOS.
    suffix : list of int
        What ends a document: what the tokenizer puts there, else EOS, else nothing.
    padding : int
        Any valid id. What is padding is known by position, never by this id.

    Raises
    ------
    UnsupportedError
        If the tokenizer does not say which characters its tokens stand for.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                "a tokenizer without offsets: targets cannot be distinguished from the prompt",
                path=name,
                hint="add the model's tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.name = name
        special = {n: str(t) for n, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special = frozenset(special)
        self.special_tokens = frozenset(special.values())
        bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        framed = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
        begin = framed.index(bare[0]) if bare and bare[0] in framed else 0
        self.prefix: list[int] = framed[:begin]
        eos = tokenizer.eos_token_id
        self.suffix: list[int] = framed[begin + len(bare) :] or ([] if eos is None else [eos])
        pad = tokenizer.pad_token_id
        self.padding: int = next((n for n in (pad, eos) if n is not None), 0)

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.tokenizer.chat_template)

    def use_template(self, path: str | PathLike[str]) -> None:
        """Render conversations with the Jinja template in a file: UTF-8, at most 1 MiB."""
        real = Path(path).resolve()
        raw = SafeDirectory(real.parent).read(real.name, _LARGEST_TEMPLATE)
        try:
            self.tokenizer.chat_template = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 at byte {error.start}", path=path) from None

    def tokenize(self, text: str) -> TokenizedText:
        """Return a text's tokens, and none besides."""
        found = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return TokenizedText(text, found["input_ids"], found["offset_mapping"])

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> str:
        """Return a conversation as the chat template writes it; `prompt` adds a generation prompt.

        It is rendered in a separate process; see `loraformat.chat_templates.process`. A template
        that writes today's date writes 26 July 2024 on every day.

        Raises
        ------
        TemplateRefusalError
            If the template does not take it.
        InputError
            If the template takes more than its share of time or memory.
        """
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several, and none of them by default
            raise TemplateRefusalError(str(error)) from None
        return shared().render(
            on_one_day(template), messages, tools=tools, prompt=prompt,
            tokens=self.tokenizer.special_tokens_map, name=self.name,
        )  # fmt: skip


def open_tokenizer(
    directory: str | PathLike[str], chat_template: str | PathLike[str] | None = None
) -> TextEncoder:
    """Open the tokenizer in a model's directory; nothing is downloaded, no code of it is run.

    `chat_template` is a file with a Jinja template that takes the place of the model's own.

    Raises
    ------
    InputError
        If there is no tokenizer, or it cannot be opened.
    MissingDependencyError
        If transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            "training needs transformers, which is not installed",
            hint="run: pip install 'loraformat[train]'",
        ) from None
    _check_files(Path(directory))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            fspath(directory), local_files_only=True, trust_remote_code=False
        )
        longest = tokenizer.model_max_length  # transformers takes anything, and compares with it
        if isinstance(longest, bool) or not isinstance(longest, int | float):
            raise InputError(
                f"model_max_length is {printable(longest)}, wanted a number",
                path=Path(directory, "tokenizer_config.json"),
            )
        encoder = TextEncoder(tokenizer, fspath(directory))
    except LoraFormatError:
        raise
    except Exception as error:  # from JSON errors to Rust panics, depending on what is broken
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"its tokenizer cannot be opened: {reason}",
            path=directory,
            hint="copy the tokenizer files of the original model there",
        ) from None
    if chat_template is not None:
        encoder.use_template(chat_template)
    return encoder


def _check_files(directory: Path) -> None:
    folder = SafeDirectory(directory)
    for name in folder.names():
        words = ("token", "config", "vocab", "merges", "chat_template", "special")
        if not name.startswith("adapters/") and any(word in name for word in words):
            os.close(folder.open(name))  # a link that leads out is refused before it is followed
