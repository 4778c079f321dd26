"""Dtypes: names in safetensors and torch, sizes in bytes.

The one table that every reader, writer and converter shares. It does not import
torch; `torch_dtype` does, when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT_DTYPES", "ITEM_BYTES", "TORCH_NAMES", "UNREAD_DTYPES", "WEIGHT_DTYPES",
    "parse_weight_dtype", "torch_dtype",
]  # fmt: skip

#: Every type that is read, by its safetensors name: bytes of one element, and what torch, ml_dtypes
#: and configuration files call it.
_TYPES = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "U16": (2, "uint16"), "I16": (2, "int16"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "U32": (4, "uint32"), "I32": (4, "int32"), "F32": (4, "float32"),
    "U64": (8, "uint64"), "I64": (8, "int64"), "F64": (8, "float64"), "C64": (8, "complex64"),
}  # fmt: skip
#: Bytes of one element, by safetensors dtype name, of every type that is read.
ITEM_BYTES = {name: nbytes for name, (nbytes, _) in _TYPES.items()}
#: Name of the same type in torch (and in configuration files), by safetensors dtype name.
TORCH_NAMES = {name: word for name, (_, word) in _TYPES.items()}

#: Those of the specification: neither bundles (rules H06 and M05) nor undo records hold others.
FORMAT_DTYPES = frozenset(ITEM_BYTES) - {"F8_E8M0"}

#: What safetensors names besides, and nothing here decodes.
UNREAD_DTYPES: dict[str, str] = {
    "F4": "4-bit floats, two in a byte",
    "F6_E2M3": "6-bit floats",
    "F6_E3M2": "6-bit floats",
    "F8_E4M3FNUZ": "8-bit floats of older AMD GPUs",
    "F8_E5M2FNUZ": "8-bit floats of older AMD GPUs",
}

#: The types a weight can be quantized from and dequantized to, by the command line's word.
WEIGHT_DTYPES: dict[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

_SPELLINGS = WEIGHT_DTYPES | {TORCH_NAMES[name]: name for name in WEIGHT_DTYPES.values()}


def parse_weight_dtype(word: str) -> str:
    """Turn a user's ``bf16`` or ``bfloat16`` into ``BF16``; refuse any other word.

    Examples
    --------
    >>> parse_weight_dtype("bf16"), parse_weight_dtype("float32")
    ('BF16', 'F32')
    """
    try:
        return _SPELLINGS[word.lower()]
    except KeyError:
        known = ", ".join(WEIGHT_DTYPES)
        raise UsageError(f"unknown dtype {word!r}, wanted one of {known}") from None


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type for a safetensors dtype name.

    Examples
    --------
    >>> torch_dtype("BF16")
    torch.bfloat16
    """
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype
