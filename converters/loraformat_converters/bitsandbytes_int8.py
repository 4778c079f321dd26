"""bitsandbytes int8 checkpoints (LLM.int8), as transformers saves them.

Format: ``Linear8bitLt`` of bitsandbytes 0.50 (2026). ``weight`` I8 (out, in); ``SCB`` F32 (out),
the largest magnitude of each output feature: W = weight · SCB · (1 / 127). ``weight_format`` is the
layout of a kernel; only 0, rows, is still written.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model import config_json
from loraformat.model.architecture import is_conv1d
from loraformat.model.block_numbers import scaled
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.packed_weights import BITSANDBYTES_INT8, ORIGINAL
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array
from loraformat.tensors.dtypes import TORCH_NAMES, WEIGHT_DTYPES

__all__ = ["CONVERTER", "METHOD"]

_CODES, _SCALE, _LAYOUT = ".weight", ".SCB", ".weight_format"
#: By what the config calls the model's dtype: the codes do not say what they were rounded from.
_DTYPES = {TORCH_NAMES[name]: name for name in WEIGHT_DTYPES.values()}
_UNIT = numpy.array([[1 / 127]], numpy.float32)


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    config = config_json.parse(stored.config) if stored.config else {}
    model_type = config.get("model_type")
    dtype = _DTYPES.get(config_json.model_dtype(stored.config) or "", "BF16")
    for name, tensor in stored.tensors.items():
        if name.endswith(_SCALE):
            owner = name.removesuffix(_SCALE)
        elif name.endswith(_CODES) and tensor.dtype == "I8":
            owner = name.removesuffix(_CODES)
            if owner + _SCALE in stored.tensors:
                continue
        else:
            continue
        yield _weight(stored, owner, dtype, is_conv1d(owner + _CODES, model_type))


def _weight(stored: Checkpoint, owner: str, dtype: str, transposed: bool) -> QuantizedWeight:
    codes = stored_part(stored, owner + _CODES, ("I8",))
    scale = stored_part(stored, owner + _SCALE, ("F32",), codes.shape[:1])
    if len(codes.shape) != 2:
        raise InputError(
            f"tensor {printable(codes.name)} is I8 {list(codes.shape)}, wanted (out, in)",
            path=stored.path,
            hint=DAMAGED,
        )
    parts = [codes, scale]
    if owner + _LAYOUT in stored.tensors:
        parts.append(layout := stored_part(stored, owner + _LAYOUT, ("U8",)))
        if layout.array().any():
            raise UnsupportedError(
                f"tensor {printable(layout.name)} names a layout of a GPU's kernel, which "
                "bitsandbytes itself no longer reads",
                path=stored.path,
                hint=ORIGINAL,
            )

    def integers(start: int, stop: int) -> Array:
        some = codes.array()[:, start:stop].T if transposed else codes.rows(start, stop)
        return some.astype(numpy.float32)

    def factors(start: int, stop: int) -> Array:
        return scale.array()[None] if transposed else scale.array()[start:stop, None]

    # Rounded after each of the two products, as bitsandbytes does.
    rows = scaled(scaled(integers, factors), lambda start, stop: _UNIT)
    shape = codes.shape[::-1] if transposed else codes.shape
    return QuantizedWeight(codes.name, shape, tuple(parts), "bitsandbytes int8", rows, dtype)


METHOD = QuantizationMethod(BITSANDBYTES_INT8, _weights)
CONVERTER = quantized_format(METHOD, "bitsandbytes int8 checkpoint (LLM.int8)")
