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
from loraformat.model.rows import RowReader
from loraformat.tensors.arrays import Array

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
    base, tuned : sequence of LazyTensor
        Of one shape: a vector (one row), a matrix, or experts; or several matrices that lie one
        below the other.
    expert : int, optional
        Which matrix of three dimensions.
    """

    def __init__(
        self, base: Sequence[LazyTensor], tuned: Sequence[LazyTensor], expert: int = 0
    ) -> None:
        self.name, self._tuned_dtype = tuned[0].name, tuned[0].dtype
        self._base, _ = _stacked(base, expert)
        self._tuned, self.shape = _stacked(tuned, expert)
        first = base[0]
        self._quantized = first if isinstance(first, NF4Tensor) and first.count else None

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """Yield (first row, tile), in order.

        Raises
        ------
        InputError
            If a value is not finite.
        """
        for first, last in row_tiles(*self.shape, _TILE_ELEMENTS):
            base, tuned = self._base(first, last), self._tuned(first, last)
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
        """Return the singular value below which the difference is rounding noise.

        The fine-tune was rounded to its dtype: step² / 12 per element. A base in NF4 adds the
        variance of its own error, unless the difference is too small to hold it: then the
        fine-tune began at the dequantized weights.
        """
        precision = PRECISIONS[self._tuned_dtype]
        least = 2.0 ** _LEAST_STEPS[self._tuned_dtype]
        steps, base_squares, squares = 0.0, 0.0, 0.0
        for first, last in row_tiles(*self.shape, _TILE_ELEMENTS):
            base, tuned = self._base(first, last), self._tuned(first, last)
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


def _stacked(tensors: Sequence[LazyTensor], expert: int) -> tuple[RowReader, tuple[int, int]]:
    """Return the reader, and the shape, of some matrices that lie one below the other."""
    shapes = [tensor.shape[-2:] for tensor in tensors]
    heights = [shape[0] if len(shape) > 1 else 1 for shape in shapes]
    readers = [tensor.row_reader() for tensor in tensors]
    columns = tensors[0].matrix_shape[1]

    def read(first: int, last: int) -> Array:
        found, start = [], 0
        for one, height in zip(readers, heights, strict=True):
            stop = start + height
            if first < stop and last > start:
                skip = expert * height - start
                found.append(one(max(first, start) + skip, min(last, stop) + skip))
            start = stop
        return found[0] if len(found) == 1 else numpy.concatenate(found)

    return read, (sum(heights), columns)
