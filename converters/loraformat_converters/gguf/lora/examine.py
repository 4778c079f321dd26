"""Facts about a GGUF adapter, for compatibility rules.

llama.cpp refuses what `read_adapter` refuses, so that there is little to add: the architecture
that the file names, which is held against the base's instead of being refused, and numbers that
are none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loraformat.errors import LoraFormatError
from loraformat.model import config_json
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.model.checkpoint import Checkpoint
from loraformat.plugins import AdapterReadOptions
from loraformat.runtimes.from_adapter import facts_of
from loraformat_converters.gguf.architectures import named_by, of_config
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.lora.read import read_adapter

__all__ = ["examine"]


def examine(path: Path, options: AdapterReadOptions) -> AdapterFacts:
    """Look at an adapter: its names, shapes and numbers.

    Parameters
    ----------
    path : Path
    options : AdapterReadOptions
        With a base of the same architecture, its own names and shapes are looked up.

    Raises
    ------
    LoraFormatError
        If llama.cpp would not load it, whatever the base.
    """
    with open_gguf(path) as gguf:
        architecture = named_by(gguf).name
    base = options.base
    same = base is not None and _architecture(base) == architecture
    read = AdapterReadOptions(base if same else None, conditional=True, inspect=True)
    with read_adapter(path, read) as adapter:
        facts = facts_of(adapter, read.base)
    return replace(facts, architecture=architecture)


def _architecture(base: Checkpoint) -> str | None:
    try:
        return of_config(config_json.parse(base.config or b"{}"))[0].name
    except LoraFormatError:
        return None
