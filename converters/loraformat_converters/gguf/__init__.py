"""GGUF, the format of llama.cpp: bases and LoRA adapters.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what llama.cpp's own
loader (``gguf.cpp``) makes of it. From the ground up:

- `container`: files of keys and tensors, checked before any other program sees them;
- `quantization`: numbers of ggml's types, to float32 and back;
- `architectures` and `tokenizers`: what keys, names and numbers mean, one file per family;
- `base`: whole models, read and written;
- `lora`: adapters, read and written.

Read `container.reader` and `architectures.llama`, then `base.write`; the others follow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from loraformat.errors import LoraFormatError
from loraformat.plugins import AdapterFormat, BaseFormat

__all__ = ["CONVERTER", "LORA_CONVERTER"]


def _late(place: str) -> Callable[..., Any]:
    """Return a function whose module is imported when it is called, which takes a while."""
    return lambda *arguments: resolve_name(f"{__name__}.{place}")(*arguments)


def sniff(path: Path) -> bool:
    """Tell whether a path is a GGUF file, but not of an adapter."""
    from loraformat_converters.gguf.container.reader import is_gguf, open_gguf

    if not is_gguf(path):
        return False
    try:
        with open_gguf(path) as gguf:
            return gguf.text("general.type", "model") != "adapter"
    except LoraFormatError:
        return True  # reading it says what is wrong


def sniff_lora(path: Path) -> bool:
    """Tell whether a path is a GGUF file of an adapter."""
    from loraformat_converters.gguf.container.reader import is_gguf

    return is_gguf(path) and not sniff(path)


CONVERTER = BaseFormat(
    name="gguf",
    summary="GGUF: one file for llama.cpp and its relatives, with tokenizer",
    sniff=sniff,
    read=_late("base.read:read"),
    write=_late("base.write:write"),
    estimate=_late("base.write:estimate"),
    output="file",
    stores="dense",
    dtypes=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    loses=("the manifest with its hashes and fingerprint",),
    suffixes=(".gguf",),
    pre_tokenizers=True,
    takes_config=True,
    requires=("gguf",),
)
LORA_CONVERTER = AdapterFormat(
    name="gguf-lora",
    summary="GGUF LoRA adapter: one file for llama.cpp and its relatives",
    sniff=sniff_lora,
    read=_late("lora.read:read"),
    write=_late("lora.write:write"),
    estimate=_late("lora.write:estimate"),
    examine=_late("lora.read:examine"),
    output="file",
    dtypes=("f32", "f16", "bf16", "q8_0"),
    loses=("training settings of the config (dropout, task type), activation statistics",),
    suffixes=(".gguf",),
    requires=("gguf",),
)
