"""Streaming GGUF writer (version 3).

Everything in the head is known before the first number is computed, so the file is written
from front to back once, in the order of the plan; a tensor comes as a series of chunks, of
which no more than one, and what waits for the disk, is in memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from struct import Struct
from typing import TYPE_CHECKING, BinaryIO

from loraformat.model.written import FileRecord
from loraformat.storage.background import BackgroundConsumer
from loraformat.storage.durable import write_all
from loraformat_converters.gguf.container.header import DEFAULT_ALIGNMENT, aligned, parse_header
from loraformat_converters.gguf.container.types import GGMLType, ValueType
from loraformat_converters.gguf.container.values import GGUFValue

if TYPE_CHECKING:
    from pathlib import Path

    from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["PlannedTensor", "file_size", "write_gguf"]

_VERSION = 3


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes
    ----------
    name : str
        At most 63 bytes of UTF-8.
    shape : tuple of int
        As numpy counts; one to four dimensions.
    type : GGMLType
    chunks : callable
        Yields its bytes, in order, in pieces of any size; called once, when its turn comes.
        `loraformat_converters.gguf.quantization.blocks.quantized_tiles` makes such pieces.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    chunks: Callable[[], Iterable[bytes | memoryview]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes, without padding."""
        return self.type.row_bytes(prod(self.shape))


def write_gguf(
    publication: AtomicOutput, metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor]
) -> FileRecord:
    """Write ``publication.file_name``: keys and tensors, both in this order.

    ``general.alignment`` is honoured, 32 without it. The record has the digest of everything before
    the first tensor, padding included.

    Raises
    ------
    InputError
        If GGUF cannot hold a name, a shape or a value.
    """
    head, total = _checked_head(metadata, tensors, publication.target)
    publication.check_space(total)
    with publication.create(publication.file_name) as file:
        write_all(file, head)
        sink = _Sink(file, _alignment(metadata))
        with BackgroundConsumer(sink.write) as background:
            for tensor in tensors:
                for chunk in tensor.chunks():
                    background.put(chunk, nbytes=_held_bytes(chunk))
                background.put(tensor, nbytes=0)
    return FileRecord(total, sha256(head).hexdigest())


def file_size(
    metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor], target: Path
) -> int:
    """Return the bytes of the file that `write_gguf` would write to ``target``.

    Raises
    ------
    InputError
        If GGUF cannot hold a name, a shape or a value.
    """
    return _checked_head(metadata, tensors, target)[1]


def _checked_head(
    metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor], target: Path
) -> tuple[bytes, int]:
    """Return the head, and the size of the whole file; what no reader would take is refused."""
    head, alignment = _encoded_head(metadata, tensors), _alignment(metadata)
    total = len(head) + sum(aligned(tensor.nbytes, alignment) for tensor in tensors)
    parse_header(lambda begin, end: head[begin:end], total, target)
    return head, total


def _held_bytes(chunk: bytes | memoryview) -> int:
    view = memoryview(chunk)
    return 0 if isinstance(view.obj, mmap.mmap) else view.nbytes


class _Sink:
    """Writes chunks, and pads where a tensor ends, which comes behind its chunks."""

    def __init__(self, file: BinaryIO, alignment: int) -> None:
        self.file, self.alignment, self._nbytes = file, alignment, 0

    def write(self, item: bytes | memoryview | PlannedTensor) -> None:
        if not isinstance(item, PlannedTensor):
            data = memoryview(item).cast("B")
            write_all(self.file, data)
            self._nbytes += data.nbytes
            return
        assert self._nbytes == item.nbytes, f"{item.name}: {self._nbytes} bytes for {item.nbytes}"
        write_all(self.file, bytes(aligned(self._nbytes, self.alignment) - self._nbytes))
        self._nbytes = 0


def _encoded_head(metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor]) -> bytes:
    """Return everything before the first tensor's bytes, padding included.

    Nothing is checked: `parse_header` does that.
    """
    alignment = _alignment(metadata)
    pieces = [b"GGUF", _u32(_VERSION), _u64(len(tensors)), _u64(len(metadata))]
    for key, value in metadata.items():
        pieces += [_text(key), _u32(value.type), *_value(value)]
    offset = 0
    for tensor in tensors:
        pieces += [_text(tensor.name), _u32(len(tensor.shape))]
        pieces += [_u64(size) for size in reversed(tensor.shape)]
        pieces += [_u32(tensor.type), _u64(offset)]
        offset += aligned(tensor.nbytes, alignment)
    head = b"".join(pieces)
    return head.ljust(aligned(len(head), alignment), b"\0")


def _alignment(metadata: Mapping[str, GGUFValue]) -> int:
    value = metadata.get("general.alignment")
    return DEFAULT_ALIGNMENT if value is None else int(value.value)


def _value(value: GGUFValue) -> list[bytes]:
    raw = bytes(value.raw)
    if value.type is ValueType.STRING:
        return [_u64(len(raw)), raw]
    if value.item_type is None:
        return [raw]
    return [_u32(value.item_type), _u64(value.count), raw]


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return _u64(len(raw)) + raw


_u32, _u64 = Struct("<I").pack, Struct("<Q").pack
