"""PEFT LoRA adapters: ``adapter_config.json`` and ``adapter_model.safetensors``.

Format: ``LoraConfig`` and ``save_pretrained`` of PEFT 0.21. `config` knows the fields and
the scaling, `keys` the names of tensors, `read` and `write` put them together; `examine` says
what other programs will find.
"""

from __future__ import annotations

from loraformat.plugins import AdapterFormat
from loraformat_converters.peft import examine, read, write

__all__ = ["CONVERTER"]

CONVERTER = AdapterFormat(
    name="peft",
    summary="PEFT LoRA adapter: one safetensors file and its config",
    sniff=read.sniff,
    read=read.read,
    write=write.write,
    examine=examine.examine,
)
