"""GGUF, the format of llama.cpp: bases and LoRA adapters.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what llama.cpp's own
loader (``gguf.cpp``) makes of it. From the bottom: `types` and `values` are the vocabulary;
`cursor`, `keys` and `header` turn bytes into a checked table of contents; `parts` and
`container` open a file; `blocks` turns stored numbers into float32 and back; `writing`
streams a new file.
`architectures` knows models, `tokenizers` their tokenizers; `base_write` and `base_read`
put them together; `lora` is for adapters.

No foreign program sees a file before `header` has accepted it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError
from loraformat.plugins import (
    AdapterReadOptions,
    AdapterWriteOptions,
    Converter,
    Forecast,
    ReadOptions,
    Requirement,
    WriteOptions,
)

if TYPE_CHECKING:
    from loraformat.model.adapter import Adapter
    from loraformat.model.adapter_facts import AdapterFacts
    from loraformat.model.checkpoint import Checkpoint
    from loraformat.model.written import WrittenModel
    from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["CONVERTER", "LORA_CONVERTER"]


def sniff(path: Path) -> bool:
    """Tell whether a path is a GGUF file, but not of an adapter."""
    from loraformat_converters.gguf.container import is_gguf, open_gguf

    if not is_gguf(path):
        return False
    try:
        with open_gguf(path) as gguf:
            return gguf.text("general.type", "model") != "adapter"
    except LoraFormatError:
        return True  # reading it says what is wrong


def read(path: Path) -> Checkpoint:
    """Open a base; see `read_with`."""
    return read_with(path, ReadOptions())


def read_with(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a base; see `loraformat_converters.gguf.base_read`."""
    from loraformat_converters.gguf import base_read

    return base_read.read(path, options)


def write(checkpoint: Checkpoint, publication: AtomicOutput, options: WriteOptions) -> WrittenModel:
    """Write one file."""
    from loraformat_converters.gguf import base_write

    return base_write.write(checkpoint, publication, options)


def estimate(checkpoint: Checkpoint, target: Path, options: WriteOptions) -> Forecast:
    """Tell what `write` would write."""
    from loraformat_converters.gguf import base_write

    return base_write.estimate(checkpoint, target, options)


CONVERTER = Converter(
    name="gguf",
    kind="base",
    summary="GGUF: one file for llama.cpp and its relatives, with tokenizer",
    sniff=sniff,
    read=read,
    read_with=read_with,
    write=write,
    estimate=estimate,
    output="file",
    stores="dense",
    dtypes=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    loses=("the manifest with its hashes and fingerprint",),
    suffixes=(".gguf",),
    pre_tokenizers=True,
    takes_config=True,
    requires=(Requirement("gguf", "gguf"),),
)


def sniff_lora(path: Path) -> bool:
    """Tell whether a path is a GGUF file of an adapter."""
    from loraformat_converters.gguf.container import is_gguf

    return is_gguf(path) and not sniff(path)


def read_lora(path: Path, options: AdapterReadOptions) -> Adapter:
    """Open an adapter; see `loraformat_converters.gguf.lora.read`."""
    from loraformat_converters.gguf.lora.read import read_adapter

    return read_adapter(path, options)


def write_lora(adapter: Adapter, publication: AtomicOutput, options: AdapterWriteOptions) -> None:
    """Write an adapter; see `loraformat_converters.gguf.lora.write`."""
    from loraformat_converters.gguf.lora.write import write_adapter

    write_adapter(adapter, publication, options)


def examine_lora(path: Path, options: AdapterReadOptions) -> AdapterFacts:
    """Look at an adapter; see `loraformat_converters.gguf.lora.examine`."""
    from loraformat_converters.gguf.lora.examine import examine

    return examine(path, options)


def forecast_lora(adapter: Adapter, target: Path, options: AdapterWriteOptions) -> Forecast:
    """Tell what `write_lora` would write."""
    from loraformat_converters.gguf.lora.write import forecast_adapter

    return forecast_adapter(adapter, target, options)


LORA_CONVERTER = Converter(
    name="gguf-lora",
    kind="adapter",
    summary="GGUF LoRA adapter: one file for llama.cpp and its relatives",
    sniff=sniff_lora,
    read_adapter=read_lora,
    write_adapter=write_lora,
    forecast_adapter=forecast_lora,
    examine=examine_lora,
    output="file",
    dtypes=("f32", "f16", "bf16", "q8_0"),
    loses=("training settings of the config (dropout, task type), activation statistics",),
    suffixes=(".gguf",),
    requires=(Requirement("gguf", "gguf"),),
)
