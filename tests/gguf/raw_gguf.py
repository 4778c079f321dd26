"""GGUF bytes by hand, lies included; every number's place is remembered for mutations."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCHITECTURE", "Key", "Raw", "Tensor", "build", "small_base", "small_lora"]

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = "BbHhIif?  Qqd"


@dataclass
class Raw:
    """Bytes under construction."""

    data: bytearray = field(default_factory=bytearray)
    #: Offset and size of every number that is a count, length, type, size or offset.
    numbers: list[tuple[int, int]] = field(default_factory=list)
    order: str = "<"

    def u32(self, value: int) -> None:
        self.numbers.append((len(self.data), 4))
        self.data += struct.pack(f"{self.order}I", value)

    def u64(self, value: int) -> None:
        self.numbers.append((len(self.data), 8))
        self.data += struct.pack(f"{self.order}Q", value)

    def text(self, text: str | bytes, length: int | None = None) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.u64(len(raw) if length is None else length)
        self.data += raw

    def value(self, kind: int, value: Any) -> None:
        if kind == STRING:
            self.text(value)
        elif isinstance(value, bytes):
            self.data += value
        else:
            self.data += struct.pack(f"{self.order}{_FORMATS[kind]}", value)


@dataclass
class Key:
    """A key; an array if ``item`` is given; ``raw`` replaces what follows the type."""

    name: str | bytes
    kind: int
    value: Any = None
    item: int | None = None
    count: int | None = None
    raw: bytes | None = None


@dataclass
class Tensor:
    """An entry of the list; sizes fastest first, as in the file. No offset: the right one."""

    name: str | bytes
    sizes: Sequence[int]
    kind: int = 0
    offset: int | None = None
    dimensions: int | None = None
    nbytes: int = 0


ARCHITECTURE = Key("general.architecture", STRING, "llama")


def build(
    keys: Iterable[Key] = (ARCHITECTURE,),
    tensors: Iterable[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
    order: str = "<",
    data: bytes | None = None,
    tail: bytes = b"",
) -> Raw:
    """Return a file. ``data`` replaces the tensors' bytes, which are else 1, 2, 3 …"""
    keys, tensors = list(keys), list(tensors)
    raw = Raw(bytearray(magic), order=order)
    raw.u32(version)
    raw.u64(len(tensors) if tensor_count is None else tensor_count)
    raw.u64(len(keys) if key_count is None else key_count)
    for key in keys:
        _put_key(raw, key)
    offset = 0
    for tensor in tensors:
        raw.text(tensor.name)
        raw.u32(len(tensor.sizes) if tensor.dimensions is None else tensor.dimensions)
        for size in tensor.sizes:
            raw.u64(size)
        raw.u32(tensor.kind)
        raw.u64(offset if tensor.offset is None else tensor.offset)
        offset += -(-tensor.nbytes // alignment) * alignment
    raw.data += bytes(-len(raw.data) % alignment)
    raw.data += bytes(n % 251 for n in range(offset)) if data is None else data
    raw.data += tail
    return raw


def _put_key(raw: Raw, key: Key) -> None:
    raw.text(key.name)
    raw.u32(key.kind)
    if key.raw is not None:
        raw.data += key.raw
    elif key.kind == ARRAY:
        assert key.item is not None
        raw.u32(key.item)
        raw.u64(len(key.value) if key.count is None else key.count)
        for value in key.value:
            raw.value(key.item, value)
    else:
        raw.value(key.kind, key.value)


def small_base() -> Raw:
    """A base in miniature: all kinds of values, a vocabulary, tensors of several types."""
    return build(
        [
            ARCHITECTURE,
            Key("general.alignment", U32, 64),
            Key("general.name", STRING, "näme"),
            Key("a.u8", U8, 1), Key("a.i8", I8, -1), Key("a.u16", U16, 2), Key("a.i16", I16, -2),
            Key("a.i32", I32, -3), Key("a.u64", U64, 4), Key("a.f64", F64, 0.5),
            Key("llama.block_count", U32, 1),
            Key("llama.epsilon", F32, 1e-5),
            Key("flag", BOOL, True),
            Key("tokens", ARRAY, ["<s>", "a", "é", ""], STRING),
            Key("scores", ARRAY, [0.0, -1.0, -2.0, 1.0], F32),
            Key("kinds", ARRAY, [1, 2, 3, 6], I32),
            Key("flags", ARRAY, [True, False], BOOL),
        ],
        [
            Tensor("token_embd.weight", [8, 4], 0, nbytes=128),
            Tensor("blk.0.ffn_up.weight", [32, 3], 8, nbytes=102),
            Tensor("blk.0.ffn_down_exps.weight", [4, 2, 2], 1, nbytes=32),
            Tensor("output_norm.weight", [5], 30, nbytes=10),
        ],
        alignment=64,
    )  # fmt: skip


def small_lora() -> Raw:
    """A LoRA in miniature."""
    return build(
        [
            Key("general.type", STRING, "adapter"),
            ARCHITECTURE,
            Key("adapter.type", STRING, "lora"),
            Key("adapter.lora.alpha", F32, 16.0),
        ],
        [
            Tensor("blk.0.attn_q.weight.lora_a", [8, 4], 0, nbytes=128),
            Tensor("blk.0.attn_q.weight.lora_b", [4, 8], 1, nbytes=64),
        ],
    )
