"""Ollama: llama.cpp's rules for GGUF files, and an import of PEFT directories of its own.

``convert/convert.go`` (``ConvertAdapter``) and ``convert_llama_adapter.go``.

From 0.34.1 on ``ollama create`` is reported to refuse a Modelfile with ``ADAPTER``
(generative-computing/mellea#1651, of ollama/ollama#14969): the merged model is what is left there.
Models that were built with it before are served on.
"""

from __future__ import annotations

from dataclasses import replace

from loraformat.runtimes.known.llama_cpp import LLAMA_CPP
from loraformat.runtimes.record import caution, differs, refuses

__all__ = ["OLLAMA"]

_IMPORT = (
    "Ollama's import of PEFT directories writes lora_alpha as the single alpha of a GGUF file; "
    "loraformat folds the remaining factor into B"
)

OLLAMA = replace(
    LLAMA_CPP,
    name="ollama",
    title="Ollama",
    version="fb30760 of 2026-08-21, from its source",
    format_why="Ollama reads GGUF files: merged models, and separate adapters before 0.34.1; it "
    "imports few PEFT directories, and Q and K incorrectly",
    imports=("llama", "gemma2"),
    treats={
        **LLAMA_CPP.treats,
        "RSLORA_IGNORED": differs(_IMPORT, "gguf"),
        "PATTERN_IGNORED": differs(_IMPORT, "gguf"),
        "ALPHA_NOT_INT": refuses(
            "Ollama's import of PEFT directories reads lora_alpha as an unsigned integer", "gguf"
        ),
        "CONV1D": refuses("Ollama's import supports only llama and gemma2", "gguf"),
        "MOE": refuses("Ollama's import maps no fused experts", "gguf"),
        "ARCHITECTURE": caution(
            "Ollama's import of PEFT directories supports only llama and gemma2; GGUF adapters "
            "must have the base's architecture",
            "gguf",
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "the chat template is in the base's GGUF file, or in a Modelfile, in Ollama's "
            "template language",
            "advice",
            "set the adapter's template with TEMPLATE in the Modelfile",
        ),
        "ROW_ORDER": caution(
            "Q and K of llama models are stored with reordered rows; Ollama's import of PEFT "
            "directories reorders A instead of B",
            "gguf",
        ),
    },
)
