"""Detection of quantized weights, and of the method that quantized them.

A checkpoint need not say in its config how it was quantized: MLX, GPTQ, AWQ and float8 files are
published without. Their codes must never be taken for weights, so that names and dtypes of the
stored tensors decide, not the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from loraformat.errors import UnsupportedError, printable

__all__ = [
    "AWQ", "BITSANDBYTES", "BITSANDBYTES_FP4", "BITSANDBYTES_INT8", "COMPRESSED_TENSORS", "FLOAT8",
    "GPTQ", "HQQ", "MLX", "MODELOPT", "MXFP4", "ORIGINAL", "TORCHAO", "PackedWeights",
    "Signature", "Stored", "packed_weights", "refuse_packed",
]  # fmt: skip

#: What helps where a method is not read.
ORIGINAL = (
    "start from the original, unquantized model; the model's page on the Hub lists it as base model"
)
#: Methods that converters read.
BITSANDBYTES, FLOAT8, MLX, MXFP4 = "bitsandbytes", "float8", "MLX", "MXFP4"
BITSANDBYTES_FP4, BITSANDBYTES_INT8 = "bitsandbytes-fp4", "bitsandbytes-int8"
AWQ, COMPRESSED_TENSORS, GPTQ, MODELOPT = "AWQ", "compressed-tensors", "GPTQ", "modelopt"
HQQ, TORCHAO = "HQQ", "torchao"
_UNKNOWN = "an unknown method"
#: Methods that also store codes which others store in the same way: there the config decides.
_NAMED_BY_CONFIG = (COMPRESSED_TENSORS, MODELOPT)

_FLOATS = ("F8_E4M3", "F8_E5M2")
#: A type of scales alone.
_EXPONENTS = "F8_E8M0"
_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
#: Integers that stand under a weight's own name where a method packs its codes.
_PACKED = ("U8", "I8", "U32", "I32", "U64", "I64")


class Stored(Protocol):
    """A tensor's dtype and shape in a header."""

    @property
    def dtype(self) -> str:
        """Safetensors name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A recognised quantization method.

    Attributes
    ----------
    method : str
        Its name.
    tensor : str
        A tensor that gave it away.
    """

    method: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Signature:
    """A quantization method, by the tensors that it stores in the place of one weight.

    Attributes
    ----------
    name : str
        Of the method.
    suffixes : tuple of str
        Endings of the tensors' names; before them all have the same.
    dtypes : tuple of str
        safetensors names: what the first of the tensors may be; anything, if there are none.
    alike : bool
        Whether the first two have the same number of columns.
    """

    name: str
    suffixes: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    alike: bool = False

    def found_in(self, tensors: Mapping[str, Stored]) -> str | None:
        """Return the name of a tensor that is a weight's first part; None if there is none."""
        first, *others = self.suffixes
        for name, tensor in tensors.items():
            if name.endswith(first) and (not self.dtypes or tensor.dtype in self.dtypes):
                owner = name.removesuffix(first)
                if not all(owner + other in tensors for other in others):
                    continue
                if not self.alike or tensors[owner + others[0]].shape[-1:] == tensor.shape[-1:]:
                    return name
        return None


#: The more special one first. GPTQ packs codes along the other dimension than zeros, AWQ does not.
_SIGNATURES = (
    Signature(BITSANDBYTES, (".quant_state.bitsandbytes__nf4",)),
    Signature(BITSANDBYTES_FP4, (".quant_state.bitsandbytes__fp4",)),
    Signature(BITSANDBYTES_INT8, (".SCB",)),
    Signature(BITSANDBYTES, (".gate_up_proj", ".gate_up_absmax"), ("U8",)),  # Experts4bit
    Signature(AWQ, (".qweight", ".qzeros"), ("I32",), alike=True),
    Signature(GPTQ, (".qweight", ".qzeros"), ("I32",)),
    Signature(MLX, (".weight", ".scales"), ("U32",)),
    Signature(MXFP4, ("_blocks", "_scales"), ("U8",)),
    Signature(FLOAT8, (".weight", ".scale"), ("I8",)),
    Signature("FP4 or INT8", (".weight", ".scale"), ("U8",)),
    Signature(COMPRESSED_TENSORS, (".weight_packed",), ("I32", "U8")),
    Signature(MODELOPT, (".weight", ".weight_scale", ".weight_scale_2"), ("U8",)),
    Signature(MODELOPT, ("", "_weight_scale", "_weight_scale_2"), ("U8",)),
    Signature(HQQ, (".W_q",)),
    Signature("EXL2", (".q_weight", ".q_scale"), ("I32",)),
    Signature("EXL3", (".trellis",), ("I16", "U16")),
    Signature("AQLM", (".codes", ".codebooks"), _INTEGERS),
    Signature("optimum-quanto", (".weight._data",), ("I8", "U8", *_FLOATS)),
    Signature(TORCHAO, ("._weight_qdata",), ("I8", "U8", "I32", *_FLOATS)),
    Signature(TORCHAO, ("_qdata", "_scale"), ("I8", *_FLOATS)),
)
#: Integer tensors of two dimensions with this ending are codes, whoever wrote them.
_WEIGHT = re.compile(r"(^|\.)(q?weight|\w+_proj)$")


def packed_weights(
    tensors: Mapping[str, Stored], more: Iterable[Signature] = (), named: object = None
) -> PackedWeights | None:
    """Return the method that quantized some of the tensors; None for dense ones.

    They are entries of headers, or lazy tensors, by name; no number is read. Methods of `more` are
    looked for before those that are known here. What the config calls the method, `named`, decides
    only between methods that store the same tensors.

    Examples
    --------
    >>> from loraformat.tensors.header import Entry
    >>> packed_weights({"up_proj.weight": Entry("up_proj.weight", "U8", (2, 2), 0, 4)})
    PackedWeights(method='an unknown method', tensor='up_proj.weight')
    """
    for one in (*more, *_SIGNATURES):
        if found := one.found_in(tensors):
            return PackedWeights(one.name, found)
    shared = named if isinstance(named, str) and named in _NAMED_BY_CONFIG else None
    for name, tensor in tensors.items():
        if tensor.dtype in _FLOATS:
            return PackedWeights(shared or FLOAT8, name)
        if tensor.dtype in _PACKED and len(tensor.shape) > 1 and _WEIGHT.search(name):
            return PackedWeights(shared or _UNKNOWN, name)
    scales = (name for name, tensor in tensors.items() if tensor.dtype == _EXPONENTS)
    found_scale = next(scales, None)
    return None if found_scale is None else PackedWeights(_UNKNOWN, found_scale)


def refuse_packed(
    path: Path,
    tensors: Mapping[str, Stored],
    method: object,
    *,
    original: str | None = None,
    readers: Mapping[str, str] = MappingProxyType({}),
    more: Iterable[Signature] = (),
) -> None:
    """Refuse quantized weights and say how to obtain dense ones.

    Parameters
    ----------
    method : object
        What the config calls the method; None if it names none.
    original : str, optional
        The model that was quantized, if the checkpoint's card names it.
    readers : mapping of str to str
        By method: the format whose converter reads it.
    more : iterable of Signature
        See `packed_weights`.
    """
    found = packed_weights(tensors, more, method)
    if found is None and method is None:
        return
    what = found.method if found is not None else printable(method)
    where = f" ({printable(found.tensor)} contains its codes)" if found is not None else ""
    if what in readers:
        hint = f"use --from {readers[what]}"
    elif original is not None:
        name = printable(original)
        hint = f"start from the original, unquantized model: {name} (from its README.md)"
    else:
        hint = ORIGINAL
    raise UnsupportedError(f"is quantized with {what}, not dense{where}", path=path, hint=hint)
