"""AWQ checkpoints in the layout "gemm", the usual one, as AutoAWQ and others write them.

Format: github.com/casper-hansen/AutoAWQ, 0.2.9 (2025). A weight (out, in) lies transposed:
``qweight`` I32 (in, out / 8), ``qzeros`` I32 (groups, out / 8), ``scales`` (groups, out);
W = scale · (code − zero). The lowest four bits of a word are its first output feature, the next its
third, then the fifth, the seventh, the second and so on: the order in which a kernel takes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.block_numbers import SCALE_TYPES, default_dtype, scaled
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import ACTIVATIONS, ACTIVATIONS_WHAT
from loraformat.model.packed_weights import AWQ, ORIGINAL
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array

__all__ = ["CONVERTER", "METHOD"]

_CODES, _SCALES = ".qweight", ".scales"
#: Where the bits of a word's output features are, in their order.
_SHIFTS = 4 * numpy.array((0, 4, 1, 5, 2, 6, 3, 7), numpy.uint32)
#: Kernels for this layout.
_VERSIONS = ("gemm", "exllama", "ipex")


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    settings = stored.quantization_config or {}
    version = settings.get("version") or settings.get("format") or "gemm"
    bits = settings.get("bits", settings.get("w_bit", 4))
    if str(version).lower() not in _VERSIONS or bits != 4:
        raise UnsupportedError(
            f"is quantized with AWQ of {printable(bits)} bits in the layout "
            f"{printable(version)}, and only 4 bits in the layout gemm can be read",
            path=stored.path,
            hint=ORIGINAL,
        )
    for name, tensor in stored.tensors.items():
        if name.endswith(_CODES) and isinstance(tensor, DenseTensor):
            yield _weight(stored, name.removesuffix(_CODES), tensor)
        elif name.endswith(_SCALES) and name.removesuffix(_SCALES) + _CODES not in stored.tensors:
            raise UnsupportedError(
                f"tensor {printable(name)} divides activations, which no dense model does",
                path=stored.path,
                hint=ORIGINAL,
            )


def _weight(stored: Checkpoint, owner: str, codes: DenseTensor) -> QuantizedWeight:
    zero = stored_part(stored, f"{owner}.qzeros", ("I32",))
    scale = stored_part(stored, owner + _SCALES, SCALE_TYPES)
    columns, words = codes.shape if len(codes.shape) == 2 else (0, 0)
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if (
        codes.dtype != "I32"
        or not groups
        or columns % groups
        or zero.shape != (groups, words)
        or scale.shape != (groups, 8 * words)
    ):
        raise InputError(
            f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)} with zeros "
            f"{list(zero.shape)} and scales {list(scale.shape)}, wanted I32 (in, out / 8), "
            "(groups, out / 8) and (groups, out), with groups that divide in",
            path=stored.path,
            hint=DAMAGED,
        )

    def factors(start: int, stop: int) -> Array:
        return scale.array()[:, start:stop].T.astype(numpy.float32)

    def zeros(start: int, stop: int) -> Array:
        return _unpacked(zero, start, stop)

    decoded = scaled(lambda start, stop: _unpacked(codes, start, stop), factors, zeros)
    return QuantizedWeight(
        f"{owner}.weight",
        (8 * words, columns),
        (codes, zero, scale),
        "AWQ int4",
        decoded,
        default_dtype(scale),
    )


def _unpacked(codes: DenseTensor, start: int, stop: int) -> Array:
    """Return codes of some output features, (stop - start, first dimension), float32."""
    first = start // 8
    words = codes.array()[:, first : -(-stop // 8)].T.astype(numpy.uint32)
    found = words[:, None, :] >> _SHIFTS[:, None] & 15
    flat = found.reshape(8 * len(words), words.shape[1]).astype(numpy.float32)
    return flat[start - 8 * first : stop - 8 * first]


METHOD = QuantizationMethod(AWQ, _weights, dropped=ACTIVATIONS, dropped_what=ACTIVATIONS_WHAT)
CONVERTER = quantized_format(METHOD, "AWQ checkpoint: 4 bits by group, in the layout gemm")
