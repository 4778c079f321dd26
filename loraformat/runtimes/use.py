"""Inputs of the generated loading commands: names, base, prompt format."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from loraformat.errors import UsageError, printable
from loraformat.runtimes.chat import Chat

__all__ = ["TEMPLATE_NAME", "Snippet", "Use", "shell_path"]

TEMPLATE_NAME = "chat_template.jinja"
"""The file of an adapter's own chat template."""

_PROMPT = "Once upon a time"
_QUESTION = "What can you do?"


@dataclass(frozen=True, slots=True)
class Use:
    """Names and options that usage snippets contain.

    Attributes
    ----------
    name : str
        What the adapter is called in requests.
    base : str
        Its base as transformers, vLLM and SGLang load it: a Hub id or a path.
    adapter : str
        Its PEFT directory: a path, or a Hub id.
    rank : int
        The largest of its ranks.
    gguf : str
        Its GGUF file for llama.cpp and Ollama.
    base_gguf : str
        The base's.
    prompt : str
        For the examples; a question, if `chat` is given.
    revision : str, optional
        Commit of the base, which is a Hub id then.
    chat : Chat, optional
        How it is prompted, if it was trained on conversations.
    on_hub : bool
        `adapter` is a Hub id.
    labels : int, optional
        Rows of the head of an adapter that classifies.

    Raises
    ------
    UsageError
        If one of them holds a line break or another control character, which no shell line and
        no Modelfile can quote safely.
    """

    name: str
    base: str
    adapter: str
    rank: int
    gguf: str = "lora.gguf"
    base_gguf: str = "model.gguf"
    prompt: str = ""
    revision: str | None = None
    chat: Chat | None = None
    on_hub: bool = False
    labels: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            object.__setattr__(self, "prompt", _QUESTION if self.chat else _PROMPT)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not (value and value.isprintable()):
                raise UsageError(
                    f"{field.name} is {printable(repr(value))}, wanted text without control "
                    "characters",
                    hint="give the adapter, or its base, another name",
                )

    @property
    def pinned_base(self) -> str:
        """The base as ``org/name@commit``, if the commit is known."""
        return f"{self.base}@{self.revision}" if self.revision else self.base

    @property
    def revision_option(self) -> str:
        """``--revision`` option with a leading space; empty if unknown."""
        return f" --revision {shlex.quote(self.revision)}" if self.revision else ""

    @property
    def merged_gguf(self) -> str:
        """File name of the merged GGUF model."""
        return f"{self.name}-merged.gguf"

    @property
    def own_template(self) -> str | None:
        """Path of the adapter's own chat template; None if it has none."""
        if self.chat is None or self.chat.template is None:
            return None
        return TEMPLATE_NAME if self.on_hub else self.chat.template

    @property
    def fetched(self) -> str:
        """Command that downloads that template, if needed."""
        if self.own_template is None or not self.on_hub:
            return ""
        return f"hf download {shlex.quote(self.adapter)} {TEMPLATE_NAME} --local-dir .\n"

    def server_option(self, option: str) -> str:
        """Return the option for that template with a leading space; empty without one."""
        own = self.own_template
        return "" if own is None else f" {option} {shell_path(own)}"

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation of the examples."""
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class Snippet:
    """Text to copy.

    Attributes
    ----------
    runtime : str
    file : str
        A name for it, ``Modelfile`` for example.
    language : str
        For a fence in Markdown: python, sh, or text.
    text : str
        Ends with a line break.
    """

    runtime: str
    file: str
    language: str
    text: str


def shell_path(word: str) -> str:
    """Return a path quoted for a shell, never mistaken for an option."""
    return shlex.quote(f"./{word}" if word.startswith("-") else word)
