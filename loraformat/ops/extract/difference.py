"""The float32 difference of two weights, computed in row tiles.

Both weights are read in tiles, too: mapped bytes where they are stored as numbers, decoded
ranges where they are NF4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy

from loraformat.algebra.ranks import noise_edge, rounding_noise
from loraformat.algebra.row_tiles import row_tiles
from loraformat.errors import InputError, printable
from loraformat.model.checkpoint import LazyTensor, NF4Tensor
from loraformat.nf4 import codec
from loraformat.tensors.arrays import Array, numpy_dtype

__all__ = ["PRECISIONS", "Difference"]

#: Bits of a significand, of the dtypes that hold real numbers.
PRECISIONS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
#: The step between subnormal numbers, as an exponent of two: no rounding is finer.
_LEAST_STEPS = {"F64": -1074, "F32": -149, "F16": -24, "BF16": -133, "F8_E4M3": -9, "F8_E5M2": -16}
_TILE_ELEMENTS = 1 << 21
_NF4_ERROR = 0.092  # ‖W − NF4(W)‖ / ‖W‖ of ordinary weights, where none is recorded


class Difference:
    """Tuned minus base in float32, row tile by row tile.

    Parameters
    ----------
    base, tuned : LazyTensor, or list of LazyTensor
        Of one shape: a vector (one row), a matrix, or experts; or several matrices that lie one
        below the other.
    expert : int, optional
        Which matrix of three dimensions.
    """

    def __init__(
        self,
        base: LazyTensor | Sequence[LazyTensor],
        tuned: LazyTensor | Sequence[LazyTensor],
        expert: int = 0,
    ) -> None:
        bases, all_tuned = _listed(base), _listed(tuned)
        self.name, self._tuned_dtype = all_tuned[0].name, all_tuned[0].dtype
        self._base, self._tuned = _rows(bases, expert), _rows(all_tuned, expert)
        first = bases[0]
        self._quantized = first if isinstance(first, NF4Tensor) and first.count else None
        self.shape = self._tuned.shape

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """Yield (first row, tile), in order.

        Raises
        ------
        InputError
            If a value is not finite.
        """
        for first, last in row_tiles(*self.shape, _TILE_ELEMENTS):
            base, tuned = self._base.read(first, last), self._tuned.read(first, last)
            wide = numpy.float64 if numpy.float64 in (base.dtype, tuned.dtype) else numpy.float32
            with numpy.errstate(over="ignore", invalid="ignore"):
                tile = numpy.subtract(tuned, base, dtype=wide).astype(numpy.float32, copy=False)
                if not math.isfinite(tile.sum()):
                    self._complain()
            yield first, tile

    def is_zero(self) -> bool:
        """Tell whether nothing changed.

        Raises
        ------
        InputError
            If a value is not finite.
        """
        return not any([tile.any() for _, tile in self.tiles()])

    def _complain(self) -> None:
        raise InputError(
            f"the difference of {printable(self.name)} is not finite: one of the models holds NaN "
            "or infinity there, or values too large to subtract",
            hint="repair the checkpoint, or leave this tensor out with --skip",
        )

    def noise_edge(self) -> float:
        """Return the singular value below which the difference is rounding.

        The fine-tune was rounded to its dtype: step² / 12 per element. A base in NF4 adds the
        variance of its own error, unless the difference is too small to hold it: then the
        fine-tune began at the dequantized weights.
        """
        precision = PRECISIONS[self._tuned_dtype]
        least = 2.0 ** _LEAST_STEPS[self._tuned_dtype]
        steps, base_squares, squares = 0.0, 0.0, 0.0
        for first, last in row_tiles(*self.shape, _TILE_ELEMENTS):
            base, tuned = self._base.read(first, last), self._tuned.read(first, last)
            values = tuned.astype(numpy.float32, copy=False)
            step = numpy.ldexp(1.0, numpy.frexp(values)[1] - precision)
            steps += float((numpy.maximum(step, least) ** 2).sum())
            if self._quantized is not None:
                base = base.astype(numpy.float32, copy=False)
                base_squares += _squared_norm(base)
                squares += _squared_norm(values - base)
        count = self.shape[0] * self.shape[1]
        sigma = rounding_noise(steps / count)
        variance = 0.0
        if self._quantized is not None:
            error = self._quantized.load().relative_rms_error
            quantization = base_squares * (_NF4_ERROR if error is None else error) ** 2
            if squares > quantization / 2:
                variance = quantization / count
        return noise_edge(math.sqrt(sigma**2 + variance), *self.shape)


def _squared_norm(values: Array) -> float:
    return float(numpy.vecdot(values, values).sum(dtype=numpy.float64))


def _listed(tensors: LazyTensor | Sequence[LazyTensor]) -> Sequence[LazyTensor]:
    return tensors if isinstance(tensors, Sequence) else [tensors]


def _rows(tensors: Sequence[LazyTensor], expert: int) -> _Rows | _Below:
    rows = [_Rows(tensor, expert) for tensor in tensors]
    return rows[0] if len(rows) == 1 else _Below(rows)


class _Below:
    """The rows of several weights, one below the other."""

    def __init__(self, parts: Sequence[_Rows]) -> None:
        self._parts = parts
        self.shape = sum(part.shape[0] for part in parts), parts[0].shape[1]

    def read(self, first: int, last: int) -> Array:
        found, start = [], 0
        for part in self._parts:
            stop = start + part.shape[0]
            if first < stop and last > start:
                found.append(part.read(max(first, start) - start, min(last, stop) - start))
            start = stop
        return found[0] if len(found) == 1 else numpy.concatenate(found)


class _Rows:
    """A weight's rows as dense numbers in its own dtype, some at a time."""

    def __init__(self, tensor: LazyTensor, expert: int) -> None:
        rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        self.shape = rows, tensor.shape[-1] if tensor.shape else 1
        self._start = expert * rows
        self._dense: Array | None = None
        if isinstance(tensor, NF4Tensor) and not tensor.transposed:
            self._codes = tensor.codes(tensor.load())
            self._scales = self._codes.scales()
            self._dtype = numpy_dtype(tensor.dtype)
        else:  # mapped bytes; codes that run over the transpose cannot be read by rows
            dense = tensor.dequantize() if isinstance(tensor, NF4Tensor) else tensor.array()
            self._dense = dense.reshape(-1, self.shape[1])

    def read(self, first: int, last: int) -> Array:
        first, last = self._start + first, self._start + last
        if self._dense is not None:
            return self._dense[first:last]
        columns = self.shape[1]
        flat = codec.dequantize(
            self._codes, dtype=self._dtype, start=first * columns, stop=last * columns,
            scales=self._scales,
        )  # fmt: skip
        return flat.reshape(-1, columns)
