"""`loraformat.nf4.codec` on torch tensors that share its memory: its peers speak torch."""

from dataclasses import dataclass

import numpy
import torch

from loraformat.nf4 import codec, rows
from loraformat.nf4.codec import BLOCK_SIZES, bits_per_weight
from loraformat.tensors.dtypes import TORCH_NAMES
from loraformat.tensors.torch_arrays import array_of, tensor_of

__all__ = [
    "BLOCK_SIZES",
    "NF4",
    "Quantized",
    "bits_per_weight",
    "dequantize",
    "dequantize_rows",
    "levels",
    "multiply_rows",
    "nested_map",
    "numpy_type",
    "quantization_error",
    "quantize",
]  # fmt: skip


def numpy_type(dtype):
    names = {getattr(torch, known): name for name, known in TORCH_NAMES.items()}
    return array_of(torch.empty(0, dtype=dtype)).dtype if dtype in names else numpy.dtype("c16")


@dataclass(frozen=True, eq=False)
class Quantized:
    """A `codec.NF4` whose arrays are shown as tensors."""

    codes: codec.NF4

    def __getattr__(self, name):
        value = getattr(self.codes, name)
        return tensor_of(value) if isinstance(value, numpy.ndarray) else value

    def scales(self, *args):
        return tensor_of(self.codes.scales(*args))


def NF4(packed, absmax, count, block_size=64, nested_absmax=None, nested_offset=None):
    nested = None if nested_absmax is None else array_of(nested_absmax)
    parts = array_of(packed), array_of(absmax)
    return Quantized(codec.NF4(*parts, count, block_size, nested, nested_offset))


def levels():
    return tensor_of(codec.levels())


def nested_map():
    return tensor_of(codec.nested_map())


def quantize(x, **options):
    return Quantized(codec.quantize(array_of(x), **options))


def dequantize(q, *, dtype=torch.bfloat16, out=None, scales=None, **options):
    if out is not None:
        options["out"] = array_of(out)
    if scales is not None:
        options["scales"] = array_of(scales)
    values = codec.dequantize(q.codes, dtype=numpy_type(dtype), **options)
    return tensor_of(values) if out is None else out


def dequantize_rows(q, out, **options):
    rows.dequantize_rows(q.codes, array_of(out), **options)
    return out


def multiply_rows(q, x, out, *, dtype=torch.float32, **options):
    rows.multiply_rows(q.codes, array_of(x), array_of(out), dtype=numpy_type(dtype), **options)
    return out


def quantization_error(x, q, **options):
    return codec.quantization_error(array_of(x), q.codes, **options)
