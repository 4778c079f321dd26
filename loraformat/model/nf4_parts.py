"""The stored tensors of an NF4 weight: names, bytes and their digest."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import prod

from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["NF4_PARTS", "NF4Parts", "Part", "content_digest"]

#: Name suffix of each stored tensor of an NF4 weight, in the order in which they are hashed.
NF4_PARTS = {
    "packed": "",
    "absmax": ".absmax",
    "nested_absmax": ".nested_absmax",
    "quant_map": ".quant_map",
    "nested_quant_map": ".nested_quant_map",
    "quant_state": ".quant_state.bitsandbytes__nf4",
}


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
        Two 4-bit codes per byte, the first in the high nibble.
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
    """

    packed: memoryview
    absmax: memoryview
    nested_absmax: memoryview | None
    quant_map: memoryview
    nested_quant_map: memoryview | None
    quant_state: bytes
    relative_rms_error: float | None = None

    def by_suffix(self) -> dict[str, memoryview]:
        """Return the parts that exist, by name suffix, in hashing order."""
        views = {suffix: getattr(self, part) for part, suffix in NF4_PARTS.items()}
        return {suffix: memoryview(view) for suffix, view in views.items() if view is not None}


def content_digest(loaded: memoryview | NF4Parts) -> str:
    """Return the SHA-256 of a loaded tensor, as 64 lowercase hexadecimal digits.

    Of an NF4 weight it covers the six parts, each after its length in bytes, an 8-byte
    little-endian integer; a part that does not exist has length 0.
    """
    if not isinstance(loaded, NF4Parts):
        return sha256(loaded).hexdigest()
    digest = sha256()
    present = loaded.by_suffix()
    for suffix in NF4_PARTS.values():
        view = present.get(suffix, memoryview(b""))
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()
