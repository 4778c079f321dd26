"""The stored tensors of an NF4 weight: names, bytes and their digest."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import prod

from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["NF4_PARTS", "SEGMENT_METHOD", "SEGMENT_PARTS", "NF4Parts", "Part", "content_digest"]

#: Name suffix of each stored tensor of an NF4 weight, in the order in which they are hashed.
NF4_PARTS = {
    "packed": "",
    "absmax": ".absmax",
    "nested_absmax": ".nested_absmax",
    "quant_map": ".quant_map",
    "nested_quant_map": ".nested_quant_map",
    "quant_state": ".quant_state.bitsandbytes__nf4",
}
#: The same of a weight with segments.
SEGMENT_PARTS = {**NF4_PARTS, "nested_offset": ".nested_offset"}


#: ``quant_method`` of a model with segments. Programs that do not know it print it.
SEGMENT_METHOD = "loraformat (import loraformat.transformers)"


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of an NF4 weight, without its bytes."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class NF4Parts:
    """The bytes of an NF4 weight, as flat memoryviews; None for parts it does not have.

    Attributes
    ----------
    packed : memoryview
        Two 4-bit codes per byte, the first in the high nibble. Here and below, the bytes of
        segments stand one after the other.
    absmax : memoryview
        Scales: uint8 codes with double quantization, float32 without; one per block.
    nested_absmax : memoryview or None
        float32, one per 256 scales.
    quant_map, nested_quant_map : memoryview
        float32: the 16 levels; the 256 values of the scale codes, or None.
    quant_state : bytes
        The JSON text.
    relative_rms_error : float or None
        ‖W − NF4(W)‖ / ‖W‖, when it was quantized just now or recorded in a bundle.
    nested_offset : memoryview or None
        float32, one per segment; None of a weight without segments, whose state has it, and
        without double quantization.
    segments : int or None
        As in the quant state.
    """

    packed: memoryview
    absmax: memoryview
    nested_absmax: memoryview | None
    quant_map: memoryview
    nested_quant_map: memoryview | None
    quant_state: bytes
    relative_rms_error: float | None = None
    nested_offset: memoryview | None = None
    segments: int | None = None

    @property
    def suffixes(self) -> dict[str, str]:
        """Name suffix of each part that such a weight may have."""
        return NF4_PARTS if self.segments is None else SEGMENT_PARTS

    def by_suffix(self) -> dict[str, memoryview]:
        """Return the parts that exist, by name suffix, in hashing order."""
        views = {suffix: getattr(self, part) for part, suffix in self.suffixes.items()}
        return {suffix: memoryview(view) for suffix, view in views.items() if view is not None}


def content_digest(loaded: memoryview | NF4Parts) -> str:
    """Return the SHA-256 of a loaded tensor, as 64 lowercase hexadecimal digits.

    Of an NF4 weight it covers the six parts, each after its length in bytes, an 8-byte
    little-endian integer; a part that does not exist has length 0. A weight with segments has a
    seventh, the offsets.
    """
    if not isinstance(loaded, NF4Parts):
        return sha256(loaded).hexdigest()
    digest = sha256()
    present = loaded.by_suffix()
    for suffix in loaded.suffixes.values():
        view = present.get(suffix, memoryview(b""))
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()
