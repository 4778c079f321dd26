"""Detection of weights quantized by unsupported methods.

A checkpoint need not say in its config how it was quantized: MLX, GPTQ, AWQ and float8 files are
published without. Their codes must never be taken for weights, so that names and dtypes of the
stored tensors decide, not the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraformat.errors import UnsupportedError, printable

__all__ = ["FLOAT8", "MXFP4", "PackedWeights", "Stored", "packed_weights", "refuse_packed"]

#: Methods that converters read.
FLOAT8, MXFP4 = "float8", "MXFP4"

_FLOATS = ("F8_E4M3", "F8_E5M2")
#: A type of scales alone.
_EXPONENTS = "F8_E8M0"
_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
#: Integers that stand under a weight's own name where a method packs its codes.
_PACKED = ("U8", "I8", "U32", "I32", "U64", "I64")


class Stored(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str:
        """Safetensors name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A quantization method that was recognised.

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
class _Method:
    """A method, by the suffixes of the tensors that stand in the place of one weight."""

    name: str
    suffixes: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the first of them

    def gave_away(self, tensors: Mapping[str, Stored]) -> str | None:
        first, *others = self.suffixes
        for name, tensor in tensors.items():
            if name.endswith(first) and tensor.dtype in self.dtypes:
                owner = name.removesuffix(first)
                if all(owner + other in tensors for other in others):
                    return name
        return None


#: The more special one first: an AWQ weight is a GPTQ weight without ``g_idx``.
_METHODS = (
    _Method("GPTQ", (".qweight", ".qzeros", ".g_idx"), ("I32",)),
    _Method("AWQ", (".qweight", ".qzeros"), ("I32",)),
    _Method("MLX", (".weight", ".scales", ".biases"), ("U32",)),
    _Method("MLX (mxfp4)", (".weight", ".scales"), ("U32",)),
    _Method(MXFP4, ("_blocks", "_scales"), ("U8",)),
    _Method("FP4 or INT8", (".weight", ".scale"), ("I8", "U8")),
    _Method("compressed-tensors", (".weight_packed",), ("I32", "U8")),
    _Method("NVFP4", (".weight", ".weight_scale", ".weight_scale_2"), ("U8",)),
    _Method("HQQ", (".W_q",), _INTEGERS),
    _Method("EXL2", (".q_weight", ".q_scale"), ("I32",)),
    _Method("EXL3", (".trellis",), ("I16", "U16")),
    _Method("AQLM", (".codes", ".codebooks"), _INTEGERS),
    _Method("optimum-quanto", (".weight._data",), ("I8", "U8", *_FLOATS)),
    _Method("torchao", ("._weight_qdata",), ("I8", "U8", "I32", *_FLOATS)),
)
#: Integer tensors of two dimensions with this ending are codes, whoever wrote them.
_WEIGHT = re.compile(r"(^|\.)(weight|\w+_proj)$")


def packed_weights(tensors: Mapping[str, Stored]) -> PackedWeights | None:
    """Return the method that quantized some of the tensors; None for dense ones.

    Parameters
    ----------
    tensors : mapping of str to Stored
        By name: entries of headers, or lazy tensors; no number is read.

    Examples
    --------
    >>> from loraformat.tensors.header import Entry
    >>> packed_weights({"up_proj.weight": Entry("up_proj.weight", "U8", (2, 2), 0, 4)})
    PackedWeights(method='an unknown method', tensor='up_proj.weight')
    """
    for method in _METHODS:
        if found := method.gave_away(tensors):
            return PackedWeights(method.name, found)
    for name, tensor in tensors.items():
        if tensor.dtype in _FLOATS:
            return PackedWeights(FLOAT8, name)
        if tensor.dtype in _PACKED and len(tensor.shape) > 1 and _WEIGHT.search(name):
            return PackedWeights("an unknown method", name)
    scales = (name for name, tensor in tensors.items() if tensor.dtype == _EXPONENTS)
    found_scale = next(scales, None)
    return None if found_scale is None else PackedWeights("an unknown method", found_scale)


def refuse_packed(
    path: Path, tensors: Mapping[str, Stored], method: object, original: str | None
) -> None:
    """Refuse weights that another method quantized, and say how dense ones are had.

    Parameters
    ----------
    path : Path
    tensors : mapping of str to Stored
    method : object
        What the config calls the method; None if it names none.
    original : str or None
        The model that was quantized, if the checkpoint's card names it.

    Raises
    ------
    UnsupportedError
        Naming the method and the remedy.
    """
    found = packed_weights(tensors)
    if found is None and method is None:
        return
    what = found.method if found is not None else printable(method)
    where = f" ({printable(found.tensor)} contains its codes)" if found is not None else ""
    raise UnsupportedError(
        f"is quantized with {what}, not dense{where}", path=path, hint=_remedy(what, original)
    )


def _remedy(method: str, original: str | None) -> str:
    if method in (FLOAT8, MXFP4):
        return f"use --from {method.lower()}"
    if original is not None:
        name = printable(original)
        return f"start from the original, unquantized model: {name} (from its README.md)"
    return (
        "start from the original, unquantized model; the model's page on the Hub lists it as "
        "base model"
    )
