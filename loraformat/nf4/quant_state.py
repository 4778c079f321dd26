"""The quant state: the JSON that bitsandbytes stores for each NF4 weight.

It holds what the packed bytes do not say: block size, dtype, shape, and with double
quantization the offset of the scales. bitsandbytes parses it with ``json.loads``;
`QuantState.encode` writes the very bytes that bitsandbytes writes.
Rules ``N05`` to ``N07`` and ``N09`` of ``spec/loraformat-1.1.md``.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import isfinite, prod
from os import PathLike
from typing import Any

from loraformat.errors import FormatError, printable
from loraformat.storage import strict_json
from loraformat.tensors.dtypes import TORCH_NAMES, WEIGHT_DTYPES

__all__ = [
    "BLOCK_SIZES",
    "LONGEST_OFFSET",
    "MAX_QUANT_STATE_BYTES",
    "NESTED_BLOCK_SIZE",
    "QuantState",
    "parse_quant_state",
]

#: Elements that may share one scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Scales that share one second-level scale.
NESTED_BLOCK_SIZE = 256
#: Longest quant state that is read (bytes).
MAX_QUANT_STATE_BYTES = 4096
#: Characters of the longest ``nested_offset``: the repr of a float32 widened to float64.
LONGEST_OFFSET = 24

_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype"}
_MEMBERS = (
    _KEYS,
    _KEYS | _NESTED_KEYS | {"nested_offset"},
    _KEYS | {"segments"},
    _KEYS | _NESTED_KEYS | {"segments"},
)
_DTYPES = {TORCH_NAMES[name]: name for name in WEIGHT_DTYPES.values()}


@dataclass(frozen=True, slots=True)
class QuantState:
    """Parsed quant state.

    Attributes
    ----------
    shape : tuple of int
        Of the weight that was quantized, as the module holds it: (out, in) for a linear.
    dtype : str
        safetensors name of the type that dequantization returns.
    block_size : int
        Elements per scale.
    nested_offset : float or None
        Added to each decoded scale; a float32 value. None without double quantization, and with
        segments, which have an offset each in a part of its own.
    double_quant : bool
        Whether the scales are quantized; an offset implies it.
    segments : int or None
        How many segments the weight has; None if it is one that does not say so.
    """

    shape: tuple[int, ...]
    dtype: str
    block_size: int
    nested_offset: float | None = None
    double_quant: bool = False
    segments: int | None = None

    def __post_init__(self) -> None:
        if self.nested_offset is not None:
            object.__setattr__(self, "double_quant", True)

    @property
    def count(self) -> int:
        """Elements of each segment."""
        return prod(self.shape) // (self.segments or 1)

    def encode(self) -> bytes:
        """Return the bytes that bitsandbytes writes for this state; it knows no segments.

        Examples
        --------
        >>> QuantState((2, 64), "BF16", 64).encode()
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}'
        """
        fields: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": TORCH_NAMES[self.dtype],
            "shape": list(self.shape),
        }
        if self.segments is not None:
            fields["segments"] = self.segments
        if self.double_quant:
            fields["nested_blocksize"] = NESTED_BLOCK_SIZE
            fields["nested_dtype"] = "float32"
        if self.nested_offset is not None:
            fields["nested_offset"] = self.nested_offset
        return json.dumps(fields).encode("ascii")


def parse_quant_state(
    raw: bytes, tensor: str, path: str | PathLike[str], *, quant_type: str = "nf4"
) -> QuantState:
    """Parse and check the JSON text of the quant state of a weight; names are for messages.

    bitsandbytes writes the same for its other type of four bits, ``fp4``.

    Raises
    ------
    FormatError
        N05 (not the JSON object it must be), N06 (a quantization that is not NF4, a block
        size or dtype that does not exist), N07 (the double quantization's members) or N09
        (segments that are not whole rows of one matrix).

    Examples
    --------
    >>> raw = QuantState((2, 64), "BF16", 64, 0.5).encode()
    >>> parse_quant_state(raw, "w", "x.safetensors").nested_offset
    0.5
    """

    def broken(rule: str, problem: str) -> FormatError:
        return FormatError(rule, f"tensor {printable(tensor)}: {problem}", path=path)

    if len(raw) > MAX_QUANT_STATE_BYTES:
        raise broken("N05", f"quant state of {len(raw)} bytes")
    try:
        fields = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise broken("N05", f"quant state is not strict JSON: {error}") from None
    if not isinstance(fields, dict) or fields.keys() not in _MEMBERS:
        raise broken("N05", "quant state has other members than bitsandbytes writes")
    shape, size, dtype = fields["shape"], fields["blocksize"], fields["dtype"]
    few = isinstance(shape, list) and len(shape) <= 8
    if not few or not all(type(n) is int and 0 < n < 1 << 48 for n in shape):
        raise broken("N05", f"quant state has shape {printable(shape)}")
    segments = fields.get("segments", 1)
    if type(segments) is not int or not 0 < segments < 1 << 48:
        raise broken("N05", f"quant state has {printable(segments)} segments")
    if fields["quant_type"] != quant_type:
        found = printable(fields["quant_type"])
        raise broken("N06", f"quant_type is {found}, wanted {quant_type}")
    if type(size) is not int or size not in BLOCK_SIZES:
        wanted = "a power of two, 32 to 4096"
        raise broken("N06", f"blocksize is {printable(size)}, wanted {wanted}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise broken("N06", f"dtype is {printable(dtype)}, wanted {', '.join(_DTYPES)}")
    nested, offset = fields.get("nested_blocksize"), None
    if nested is not None or "nested_dtype" in fields:
        plain = type(nested) is int and fields["nested_dtype"] == "float32"
        if not plain or nested != NESTED_BLOCK_SIZE:
            raise broken("N07", "nested_blocksize must be 256 and nested_dtype float32")
    if "nested_offset" in fields:
        offset = _float32(fields["nested_offset"])
        if offset is None:
            found = printable(fields["nested_offset"])
            raise broken("N07", f"nested_offset is {found}, wanted a finite float32")
    if "segments" not in fields:
        return QuantState(tuple(shape), _DTYPES[dtype], size, offset)
    if len(shape) < 3 or prod(shape[:-1]) % segments or segments % prod(shape[:-2]):
        raise broken("N09", f"{segments} segments are not whole rows of one matrix of {shape}")
    double_quant = nested is not None
    return QuantState(tuple(shape), _DTYPES[dtype], size, None, double_quant, segments)


def _float32(value: Any) -> float | None:
    if type(value) not in (int, float) or not isfinite(value):
        return None
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        return None
    return float(rounded) if rounded == value else None
