"""Rounding of matrices to a stored type, with error measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy

from loraformat.model.checkpoint import LazyTensor
from loraformat.model.written import TensorRecord
from loraformat.nf4.kernels.cast import widened
from loraformat.nf4.kernels.threads import run
from loraformat.tensors.arrays import Array
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.quantization.blocks import dequantize, quantize

if TYPE_CHECKING:
    from loraformat.plugins import RoundingObserver

__all__ = ["Loss", "Lost", "Watched", "rounded"]

#: Numbers in a tile, which one thread takes, and in a window, which is handed over.
_TILE, _WINDOW = 1 << 18, 1 << 21
#: Numbers whose products are summed in float32, to six digits; sums of sums are float64.
_SUMMED = 1 << 16


@dataclass(slots=True)
class Lost:
    """What rounding lost of some numbers: sums over them."""

    error: float = 0.0  # squares of the errors
    norm: float = 0.0  # squares of the numbers
    shift: float = 0.0  # the errors themselves
    count: int = 0

    def add(self, other: Lost) -> None:
        """Add those of other numbers."""
        self.error += other.error
        self.norm += other.norm
        self.shift += other.shift
        self.count += other.count

    @property
    def relative(self) -> float:
        """Relative RMS error."""
        return sqrt(self.error / self.norm) if self.norm else 0.0

    @property
    def bias(self) -> float:
        """Mean of the errors, in units of the numbers' RMS."""
        return self.shift / sqrt(self.norm * self.count) if self.norm else 0.0


@dataclass
class Loss:
    """What rounding lost, by tensor of the source."""

    sums: dict[str, Lost] = field(default_factory=dict)

    def add(self, name: str, lost: Lost) -> None:
        """Add what was lost of some numbers of a tensor."""
        self.sums.setdefault(name, Lost()).add(lost)

    @property
    def total(self) -> float:
        """Relative RMS error of all weights that were rounded."""
        whole = Lost()
        for lost in self.sums.values():
            whole.add(lost)
        return whole.relative

    @property
    def largest_bias(self) -> float:
        """The `Lost.bias` of the tensor that has the largest one in magnitude."""
        return max((lost.bias for lost in self.sums.values()), key=abs, default=0.0)

    def records(self, tensors: Mapping[str, LazyTensor]) -> dict[str, TensorRecord]:
        """Return the errors in the form that reports are made of, to three digits."""
        return {
            name: TensorRecord(
                "dense",
                tensors[name].dtype,
                tensors[name].shape,
                "",
                relative_rms_error=float(f"{lost.relative:.3g}"),
            )
            for name, lost in self.sums.items()
        }


@dataclass(frozen=True, slots=True)
class Watched:
    """A matrix whose stored values are passed to an observer.

    Attributes
    ----------
    watch : RoundingObserver
    before : callable
        Returns rows of what the matrix was, as `rounded` asks for those of what it is.
    """

    watch: RoundingObserver
    before: Callable[[int, int], Array]


def rounded(
    rows_of: Callable[[int, int], Array],
    rows: int,
    length: int,
    kind: GGMLType,
    name: str,
    loss: Loss | None,
    watched: Watched | None = None,
) -> Iterator[bytes]:
    """Yield the bytes of a matrix in a type.

    Parameters
    ----------
    rows_of : callable
        Returns rows ``start`` to ``stop``, floating, of any type; called by several threads.
    rows : int
    length : int
        Numbers in a row.
    kind : GGMLType
        One of `loraformat_converters.gguf.quantization.blocks.QUANTIZABLE`.
    name : str
        Of the tensor of the source.
    loss : Loss or None
        Where the difference is added up; None if there is none.
    watched : Watched, optional

    Raises
    ------
    UnsupportedError, InputError
        See `loraformat_converters.gguf.quantization.blocks.quantized_tiles`.
    """
    from loraformat.algebra.blas import one_blas_thread

    step = max(1, _TILE // max(length, 1))
    window = step * (_WINDOW // _TILE)
    for start in range(0, rows, window):
        done: dict[int, tuple[bytes, Lost | None, object]] = {}

        def tile(begin: int, end: int, start: int = start, done: Any = done) -> None:
            values = rows_of(start + begin, start + end)
            stored, lost, measured = quantize(values, kind, name), None, None
            if loss is not None or watched is not None:
                found = _read(stored, values, kind, name)
            if watched is not None:
                before = watched.before(start + begin, start + end)
                # Rounding takes longest: one tile of a window is enough to count by.
                asked = begin == 0
                alone = _read(quantize(before, kind, name), before, kind, name) if asked else None
                measured = watched.watch.compare(widened(before), widened(values), found, alone)
            if loss is not None:
                lost = _difference(values, found)
            done[begin] = stored, lost, measured

        with one_blas_thread():
            run(tile, min(window, rows - start), step)
        for begin in sorted(done):  # in order, so that the sums are the same every time
            stored, lost, measured = done[begin]
            if loss is not None and lost is not None:
                loss.add(name, lost)
            if watched is not None:
                watched.watch.add(name, measured)
            yield stored


def _read(stored: bytes, values: Array, kind: GGMLType, name: str) -> Array:
    """Return what is read of numbers that were stored."""
    return dequantize(memoryview(stored), kind, tuple(values.shape), name, threads=1)


def _difference(values: Array, found: Array) -> Lost:
    """Compare numbers with what is read of them, which is overwritten."""
    values = widened(values)
    off = numpy.subtract(found, values, out=found)
    return Lost(_square(off), _square(values), float(off.sum(dtype=numpy.float64)), off.size)


def _square(values: Array) -> float:
    flat = values.reshape(-1)
    pieces = (flat[start : start + _SUMMED] for start in range(0, flat.size, _SUMMED))
    return sum(float(numpy.dot(piece, piece)) for piece in pieces)
