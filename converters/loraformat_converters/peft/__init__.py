"""PEFT LoRA adapters: ``adapter_config.json`` and ``adapter_model.safetensors``.

Format: ``LoraConfig`` and ``save_pretrained`` of PEFT 0.21. `config` knows the fields and
the scaling, `keys` the names of tensors, `read` and `write` put them together; `examine` says
what other programs will find.
"""

from __future__ import annotations

from loraformat.plugins import Converter
from loraformat_converters.peft.examine import examine
from loraformat_converters.peft.read import read_adapter, sniff
from loraformat_converters.peft.write import write_adapter

__all__ = ["CONVERTER"]

CONVERTER = Converter(
    name="peft",
    kind="adapter",
    summary="PEFT LoRA adapter: one safetensors file and its config",
    sniff=sniff,
    read_adapter=read_adapter,
    write_adapter=write_adapter,
    examine=examine,
)
