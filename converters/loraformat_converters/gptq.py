"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and others write them.

Format: github.com/ModelCloud/GPTQModel, 7.7 (2026). A weight (out, in) lies transposed: ``qweight``
I32 (in · bits / 32, out), packed along the input, 32 codes of three bits in three words; ``scales``
(groups, out); ``qzeros`` I32 (groups, out · bits / 32), packed along the output; ``g_idx`` the
group of each input feature. W = scale · (code − zero). The first version of the format, which is
still the usual one, stores zero − 1.

``sym`` in the config says that every zero is the middle of the codes. Then ``qzeros`` is not asked,
as kernels for such models do not: some checkpoints store it in one version and name the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.families.table import model_type
from loraformat.model import config_json
from loraformat.model.architecture import is_conv1d
from loraformat.model.block_numbers import SCALE_TYPES, by_column, default_dtype, scaled
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import ACTIVATIONS, ACTIVATIONS_WHAT
from loraformat.model.packed_weights import GPTQ, ORIGINAL
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array
from loraformat.tensors.packed_codes import unpack

__all__ = ["CONVERTER", "METHOD"]

_CODES = ".qweight"
_BITS = (2, 3, 4, 8)
#: What is added to a stored zero, by format; codes of 3 bits have a form of their own in gptq_p.
_OFFSETS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    settings = stored.quantization_config or {}
    named = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    method = settings.get("quant_method") or "gptq"
    symmetric = settings.get("sym") is True
    # AutoRound's zeros are of either version.
    known = method == "gptq" or (method in ("auto-round", "intel/auto-round") and symmetric)
    known = known and isinstance(named, str) and named in _OFFSETS
    if not known or settings.get("is_marlin_format"):
        raise UnsupportedError(
            f"is quantized with {printable(method)} in the format {printable(named)}, and of GPTQ "
            f"only {', '.join(_OFFSETS)} can be read",
            path=stored.path,
            hint=ORIGINAL,
        )
    kind = model_type(config_json.parse(stored.config)) if stored.config else None
    for name, codes in stored.tensors.items():
        if not name.endswith(_CODES) or not isinstance(codes, DenseTensor):
            continue
        owner = name.removesuffix(_CODES)
        if is_conv1d(f"{owner}.weight", kind):
            raise UnsupportedError(
                f"tensor {printable(name)} is of a Conv1D, whose weight stands the other way round "
                "than GPTQ packs it, which is not supported",
                path=stored.path,
                hint=ORIGINAL,
            )
        yield _weight(stored, owner, codes, named, symmetric)


def _weight(
    stored: Checkpoint, owner: str, codes: DenseTensor, named: str, symmetric: bool
) -> QuantizedWeight:
    zero = stored_part(stored, f"{owner}.qzeros", ("I32",))
    scale = stored_part(stored, f"{owner}.scales", SCALE_TYPES)
    bits, columns = _sizes(stored, codes, zero, scale)
    if bits == 3 and named == "gptq_p":
        raise UnsupportedError(
            f"tensor {printable(codes.name)} has codes of 3 bits in the format gptq_p, which "
            "cannot be read",
            path=stored.path,
            hint=ORIGINAL,
        )
    groups, rows = scale.shape
    parts, order = [codes, zero, scale], None
    if f"{owner}.g_idx" in stored.tensors:
        order = stored_part(stored, f"{owner}.g_idx", ("I32", "I64"), (columns,))
        parts.append(order)
    elif columns % groups:
        raise InputError(
            f"tensor {printable(scale.name)} has scales of {groups} groups, which do not divide "
            f"the {columns} columns of the weight, and no g_idx",
            path=stored.path,
            hint=DAMAGED,
        )

    def ordered(numbers: Array) -> Array:
        if order is None:
            return numbers
        return by_column(numbers, columns, order.array(), order.name, stored.path)

    def integers(start: int, stop: int) -> Array:
        return unpack(codes.array()[:, start:stop].T, bits, 0, columns)

    def factors(start: int, stop: int) -> Array:
        return ordered(scale.array()[:, start:stop].T.astype(numpy.float32))

    def zeros(start: int, stop: int) -> Array:
        if symmetric:
            return numpy.full((1, 1), 1 << bits - 1, numpy.float32)
        found = unpack(zero.array(), bits, start, stop).T + _OFFSETS[named]
        return ordered(found % (1 << bits))

    decoded, stored_as = scaled(integers, factors, zeros), f"GPTQ int{bits}"
    return QuantizedWeight(
        f"{owner}.weight", (rows, columns), tuple(parts), stored_as, decoded, default_dtype(scale)
    )


def _sizes(
    stored: Checkpoint, codes: DenseTensor, zero: DenseTensor, scale: DenseTensor
) -> tuple[int, int]:
    """Return bits of a code and columns of the weight, which the shapes say."""
    settings = stored.quantization_config or {}
    if codes.dtype == "I32" and len(codes.shape) == len(zero.shape) == len(scale.shape) == 2:
        groups, rows = scale.shape
        words = codes.shape[0]
        for bits in _BITS:
            fits = zero.shape == (groups, -(-rows * bits // 32)) and not words * 32 % bits
            if fits and groups and codes.shape[1] == rows and _declared(settings, bits):
                return bits, words * 32 // bits
    wanted = settings.get("bits") if not settings.get("dynamic") else None
    raise InputError(
        f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)} with zeros "
        f"{list(zero.shape)} and scales {list(scale.shape)}, wanted I32 (in * bits / 32, out), "
        f"(groups, out * bits / 32) and (groups, out), with {printable(wanted or '2, 3, 4 or 8')} "
        "bits",
        path=stored.path,
        hint=DAMAGED,
    )


def _declared(settings: dict[str, object], bits: int) -> bool:
    """Tell whether the config allows these bits; with ``dynamic``, modules have their own."""
    return bool(settings.get("dynamic")) or settings.get("bits", bits) == bits


METHOD = QuantizationMethod(GPTQ, _weights, dropped=ACTIVATIONS, dropped_what=ACTIVATIONS_WHAT)
CONVERTER = quantized_format(
    METHOD, "GPTQ checkpoint: 2, 3, 4 or 8 bits by group, of either version of the format"
)
