"""The Modelfile that creates an Ollama model from an adapter, merged or separate."""

from __future__ import annotations

import shlex

from loraformat.runtimes.chat import Chat
from loraformat.runtimes.use import Snippet, Use, shell_path

__all__ = ["ollama"]


def ollama(use: Use) -> Snippet:
    """Return a Modelfile of the merged model, with paths relative to it.

    Ollama 0.34.1 and later refuse ``ADAPTER`` when a model is created, as
    generative-computing/mellea#1651 reports of ollama/ollama#14969; models that were built with
    it are served. So the two lines for older versions are comments.

    Examples
    --------
    >>> print(ollama(Use("polite", "org/base", "A", 8)).text, end="")
    # loraformat merge org/base A -o polite-merged.gguf
    # ollama create polite -f Modelfile && ollama run polite
    FROM ./polite-merged.gguf
    <BLANKLINE>
    # Ollama before 0.34.1 also takes the adapter beside its base, in place of FROM above:
    # FROM ./model.gguf
    # ADAPTER ./lora.gguf
    """
    merged = use.merged_gguf
    text = f"""\
# loraformat merge {shell_path(use.pinned_base)} {shell_path(use.adapter)} -o {shell_path(merged)}
# ollama create {shlex.quote(use.name)} -f Modelfile && ollama run {shlex.quote(use.name)}
FROM {_file(merged)}
{_ollama_chat(use.chat)}
# Ollama before 0.34.1 also takes the adapter beside its base, in place of FROM above:
# FROM {_file(use.base_gguf)}
# ADAPTER {_file(use.gguf)}
"""
    return Snippet("ollama", "Modelfile", "text", text)


def _ollama_chat(chat: Chat | None) -> str:
    if chat is None:
        return ""
    template = chat.format and chat.format.ollama()
    lines = (
        [f'TEMPLATE """{template}"""']
        if template
        else [
            "# The chat template is not put in Ollama's language here: Ollama takes the one in the "
            "GGUF",
            "# file if it knows that; say it with TEMPLATE otherwise.",
        ]
    )
    stops = [*chat.stops, *filter(str.isprintable, filter(None, [chat.stop_text]))]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if _quoted(stop)]
    return "".join(f"{line}\n" for line in lines)


def _quoted(text: str) -> str:
    """Return text quoted for a Modelfile; empty if it cannot be quoted."""
    return (
        ""
        if '"""' in text or text.endswith('"')
        else f'"""{text}"""'
        if '"' in text
        else (f'"{text}"')
    )


def _file(word: str) -> str:
    """Return a path for a Modelfile, with a slash so that it is not read as a model name."""
    return word if word.startswith(("/", "./", "../")) else f"./{word}"
