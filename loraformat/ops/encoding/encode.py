"""Lazy quantization, dequantization and dtype conversion.

Each function takes a lazy tensor and returns a lazy tensor; the work happens when a
writer loads it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt

import numpy

from loraformat.errors import UnsupportedError, UsageError
from loraformat.model.architecture import (
    is_conv1d,
    is_decoder_linear,
    is_expert_stack,
    is_matrix_weight,
    is_one_expert,
)
from loraformat.model.checkpoint import DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4Parts
from loraformat.model.rows import Elements, RowReader
from loraformat.nf4.kernels.cast import cast as narrow
from loraformat.nf4.kernels.cast import widened
from loraformat.nf4.quant_state import BLOCK_SIZES, QuantState
from loraformat.nf4.segments import NF4Stack, stacked
from loraformat.nf4.tables import LEVEL_BYTES, NESTED_MAP_BYTES
from loraformat.tensors.arrays import Array, array_bytes
from loraformat.tensors.dtypes import WEIGHT_DTYPES

__all__ = ["QuantizationPolicy", "cast", "dequantized", "nf4_parts", "quantized"]


@dataclass(frozen=True, slots=True)
class QuantizationPolicy:
    """Which weights become NF4, and how.

    Attributes
    ----------
    block_size : int
        Elements per scale: a power of two from 32 to 4096.
    double_quant : bool
        Quantize the scales too (Dettmers 2023, section 3).
    skip, include : sequence of str
        Patterns (``*`` matches anything) over tensor or module names: weights to keep plain,
        weights to quantize though they are not linears of decoder layers. ``skip`` wins.
    stacks : bool
        Quantize stacks of experts, too, each matrix by itself.
    one_run : bool
        Quantize such a stack as one run of blocks, as bitsandbytes does; then not in segments.
    each_expert : bool
        Quantize experts that are matrices of their own, too.
    plain : sequence of str
        Parts of names of linears that stay dense unless included: transformers has no 4-bit form.

    Raises
    ------
    UsageError
        For a block size that does not exist.
    """

    block_size: int = 64
    double_quant: bool = True
    skip: Sequence[str] = ()
    include: Sequence[str] = ()
    stacks: bool = False
    one_run: bool = False
    each_expert: bool = False
    plain: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"block size {self.block_size}, wanted one of {', '.join(map(str, BLOCK_SIZES))}"
            )

    def selects(self, tensor: DenseTensor) -> bool:
        """Tell whether a tensor becomes NF4."""
        if not tensor.count or tensor.dtype not in WEIGHT_DTYPES.values():
            return False
        if matches(tensor.name, self.skip):
            return False
        if len(tensor.shape) == 3:
            return self.stacks and is_expert_stack(tensor.name)
        if self.each_expert and is_one_expert(tensor.name):
            return len(tensor.shape) == 2
        if matches(tensor.name, self.include):
            return is_matrix_weight(tensor.name, tensor.shape)
        return is_decoder_linear(tensor.name, tensor.shape, self.plain)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a tensor's name, or its module's, matches one of the patterns.

    Examples
    --------
    >>> matches("model.layers.0.mlp.up_proj.weight", ["*.up_proj"])
    True
    """
    names = (name, name.removesuffix(".weight"))
    return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in patterns)


def quantized(tensor: DenseTensor, policy: QuantizationPolicy, model_type: str | None) -> NF4Tensor:
    """Return a weight of F32, F16 or BF16 in NF4; it is quantized when it is loaded.

    Of a stack each matrix is a segment, unless the policy wants one run of blocks. ``Conv1D``
    weights of the model type are turned into linears first, as bitsandbytes does.
    """
    transposed = is_conv1d(tensor.name, model_type)
    stack = len(tensor.shape) > 2 and not policy.one_run
    segments = prod(tensor.shape[:-2]) if stack else None
    return NF4Tensor(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        policy.block_size,
        policy.double_quant,
        transposed,
        partial(_quantize, tensor, policy, transposed, segments),
        tensor.release,
        segments,
    )


def _quantize(
    tensor: DenseTensor, policy: QuantizationPolicy, transposed: bool, segments: int | None
) -> NF4Parts:
    from loraformat.nf4 import codec

    weight = tensor.array().T if transposed else tensor.elements()
    error = norm = 0.0

    def encoded() -> Iterator[codec.NF4]:
        nonlocal error, norm
        for piece in _cut(weight, segments or 1):
            codes = codec.quantize(
                piece,
                block_size=policy.block_size,
                double_quant=policy.double_quant,
                name=tensor.name,
            )
            squares = codec.quantization_error(piece, codes)
            error, norm = error + squares[0], norm + squares[1]
            yield codes

    stack = stacked(encoded(), segments or 1)
    shape = tensor.shape[::-1] if transposed else tensor.shape
    # Three digits: enough to judge by, and the same on every machine.
    relative = float(f"{sqrt(error / norm):.3g}") if norm else 0.0
    return nf4_parts(stack, shape, tensor.dtype, segments, relative)


def nf4_parts(
    stack: NF4Stack,
    shape: tuple[int, ...],
    dtype: str,
    segments: int | None,
    error: float | None = None,
) -> NF4Parts:
    """Return what is stored of a weight in NF4.

    Parameters
    ----------
    stack : NF4Stack
        A weight without segments is one.
    shape : tuple of int
        That the codes run over.
    dtype : str
        safetensors name: of the decoded numbers.
    segments : int or None
        As in the quant state.
    error : float, optional
        Relative RMS error, if it is known.
    """
    nested, offset = stack.nested_absmax, stack.nested_offset
    state_offset = None if offset is None or segments else float(offset[0])
    return NF4Parts(
        packed=array_bytes(stack.packed),
        absmax=array_bytes(stack.absmax),
        nested_absmax=None if nested is None else array_bytes(nested),
        quant_map=memoryview(LEVEL_BYTES),
        nested_quant_map=None if nested is None else memoryview(NESTED_MAP_BYTES),
        quant_state=QuantState(
            shape, dtype, stack.block_size, state_offset, nested is not None, segments
        ).encode(),
        relative_rms_error=error,
        nested_offset=array_bytes(offset) if segments and offset is not None else None,
        segments=segments,
    )


def _cut(weight: Array | Elements, number: int) -> Iterator[Array | Elements]:
    """Yield equal runs of elements; a whole weight as it is."""
    if number == 1:
        yield weight
        return
    count = weight.size // number
    for start in range(0, count * number, count):
        yield (
            weight[start : start + count]
            if isinstance(weight, numpy.ndarray)
            else weight.run(start, count)
        )


def dequantized(tensor: NF4Tensor, dtype: str | None = None) -> DenseTensor:
    """Return an NF4 weight in its own or another dense dtype; dequantized when it is loaded."""
    return DenseTensor.by_rows(
        tensor.name, dtype or tensor.dtype, tensor.shape, partial(tensor.row_reader, dtype),
        tensor.release,
    )  # fmt: skip


def cast(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """Return a floating-point tensor in another dtype, rounded to nearest even; others as they are.

    That is F32, F16 or BF16; None changes nothing. Of an NF4 weight only the dtype that
    dequantization returns could change, and it is stored; it stays.

    Raises
    ------
    UnsupportedError
        On loading, if a finite number becomes infinite (float16 ends at 65504).
    """
    floating = tensor.dtype in ("F64", *WEIGHT_DTYPES.values())
    if dtype is None or dtype == tensor.dtype or not floating or isinstance(tensor, NF4Tensor):
        return tensor

    def open_rows() -> RowReader:
        read = tensor.row_reader()
        return lambda start, stop: _narrowed(tensor.name, read(start, stop), dtype)

    return DenseTensor.by_rows(tensor.name, dtype, tensor.shape, open_rows, tensor.release)


def _narrowed(name: str, values: Array, dtype: str) -> Array:
    values = widened(values)
    if dtype != "F16":
        return values
    result = numpy.empty(values.shape, numpy.float16)
    narrow(values, result)
    lost = numpy.isinf(result) & numpy.isfinite(values)
    if lost.any():
        raise UnsupportedError(
            f"tensor {name}: numbers such as {values[lost][0]:g} are beyond float16's 65504",
            hint="use --dtype bf16 or --dtype f32",
        )
    return result
