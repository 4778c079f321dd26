"""Merged tensors, lazily: an edit becomes a dense tensor that is computed when it is loaded.

A tensor is walked over in tiles of whole rows. For each one the delta is formed, added,
rounded and measured; nothing of the size of the delta is ever held. The result lies in a
buffer that is used again once the tensor is released. What is quantized again is measured after
that.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from loraformat.algebra.row_tiles import row_tiles
from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4Parts
from loraformat.model.vocabulary import resized
from loraformat.nf4.kernels.merge_tile import TileSums, merge_tile
from loraformat.nf4.kernels.native import DTYPES
from loraformat.ops.encoding.encode import QuantizationPolicy, quantized
from loraformat.ops.merge.deltas import (
    TILE_ELEMENTS,
    LowRankUpdate,
    block_matrices,
    finite,
    over_tiles,
)
from loraformat.ops.merge.plan import TensorEdit
from loraformat.ops.merge.recorder import Encoded, UndoRecorder
from loraformat.ops.merge.report import Meter
from loraformat.tensors.arrays import Array, array_bytes, array_view, dtype_name, numpy_dtype
from loraformat.tensors.arrays import finite as all_finite

__all__ = ["BufferPool", "MergedTensor", "requantized"]

#: Elements of a tile where no record says so: larger ones spend less time in Python.
_PLAIN_TILE_ELEMENTS = 1 << 17
_FLOATS = ("F32", "F16", "BF16")
#: Buffers below this are left to the allocator, which does as well.
_LEAST_BUFFER = 1 << 20
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class MergedTensor:
    """A tensor with its edit, which is computed when it is loaded.

    Parameters
    ----------
    edit : TensorEdit
    source : LazyTensor or None
        What it starts from; None if it is new.
    adapters, weights
        As the edit counts them.
    dtype : str, optional
        safetensors name of the output; the source's own by default.
    meter : Meter, optional
        Takes what the report says.
    recorder : UndoRecorder, optional
        Takes what undoing needs; the deltas are in fixed point then.
    pool : BufferPool, optional
        Where the result's buffer comes from, and goes when it is released.
    """

    edit: TensorEdit
    source: LazyTensor | None
    adapters: Sequence[Adapter] = ()
    weights: Sequence[float] = ()
    dtype: str | None = None
    meter: Meter | None = None
    recorder: UndoRecorder | None = None
    pool: BufferPool = field(default_factory=lambda: BufferPool())
    _held: list[Array] = field(default_factory=list, init=False)

    def dense(self) -> DenseTensor:
        """Return it as a tensor of a checkpoint; types that cannot be merged are refused."""
        edit = self.edit
        start = self.source or (edit.replacement[1] if edit.replacement else None)
        assert start is not None
        if start.dtype not in _FLOATS:
            raise UnsupportedError(
                f"tensor {printable(edit.name)} is {start.dtype}, and only F32, F16, BF16 and NF4 "
                "weights can be merged",
                hint="convert the base with --dtype first",
            )
        dtype = self.dtype or start.dtype
        shape = start.shape if edit.height is None else (edit.height, *start.shape[1:])

        def load() -> memoryview:
            with numpy.errstate(all="ignore"):  # what overflows is refused below
                return array_bytes(self._made(dtype))

        def release() -> None:
            while self._held:
                self.pool.give(self._held.pop())
            start.release()

        return DenseTensor(edit.name, dtype, shape, load, release)

    def _made(self, dtype: str) -> Array:
        original = self._original()
        start = self._replaced(original)
        changes = bool(self.edit.terms) or start.dtype != numpy_dtype(dtype)
        merged = self._walk(start, dtype) if changes or self.recorder is not None else start
        if self.recorder is not None:
            rows = [i for n in self.edit.rows for i in self._rows_of(self.adapters[n]).indices]
            whole = memoryview(b"") if original is None else array_bytes(original)
            self.recorder.finish(whole, rows)
        return merged

    def _buffer(self, count: int, dtype: str) -> Array:
        """Return a flat buffer, held until the tensor is released."""
        nbytes = count * numpy_dtype(dtype).itemsize
        self._held.append(self.pool.take(nbytes))
        return array_view(self._held[-1][:nbytes].data, dtype)

    def _original(self) -> Array | None:
        if isinstance(self.source, NF4Tensor):
            values = self._buffer(self.source.count, "F32")
            whole = self.source.dequantize("F32", out=values)
            return numpy.ascontiguousarray(whole)
        return None if self.source is None else self.source.array()

    def _replaced(self, original: Array | None) -> Array:
        """Put replacements in; with a weight ω they are W + ω (R − W)."""
        if original is not None and self.edit.height is not None:
            original = resized(original, self.edit.height)
        values = original
        if self.edit.replacement is not None:
            number, tensor = self.edit.replacement
            values = _blend(original, _finite_as_stored(tensor), self.weights[number])
        assert values is not None
        if self.edit.rows:
            values = values.copy()  # it may be mapped, and is not written to
        for number in self.edit.rows:
            rows = self._rows_of(self.adapters[number])
            index = list(rows.indices)
            new = _blend(values[index], _finite_as_stored(rows.rows), self.weights[number])
            if new.dtype != values.dtype:
                values = values.astype(numpy.float32)
            values[index] = new
        return values

    def _rows_of(self, adapter: Adapter) -> Any:
        found = adapter.rows.get(self.edit.name) or adapter.rows.get(self.edit.source or "")
        return found or next(iter(adapter.rows.values()))  # of the embedding a head was tied to

    def _walk(self, start: Array, dtype: str) -> Array:
        if start.dtype not in DTYPES:  # a replacement's
            start = start.astype(numpy.float32)
        merged = self._buffer(start.size, dtype).reshape(start.shape)
        height, columns = (1, 1, *start.shape)[-2:]
        stack = start.shape[0] if start.ndim == 3 else 1
        weights, results = (v.reshape(stack, height, columns) for v in (start, merged))
        matrices = block_matrices(start.shape, self.edit.terms, self.adapters)
        for weight, result, matrix in zip(weights, results, matrices, strict=True):
            if matrix is None and self.recorder is None and weight.dtype == result.dtype:
                result[...] = weight
            else:
                self._merge_matrix(weight, result, matrix)
        return merged

    def _merge_matrix(self, weight: Array, result: Array, matrix: LowRankUpdate | None) -> None:
        deltas, gain = None, None
        if matrix is not None:
            gains = matrix.measured_gains(weight)
            if self.recorder is not None:
                self.recorder.gains(gains)
            exact = self.recorder is not None
            deltas, gain = matrix.combined(gains, exact=exact, in_turn=self.edit.in_turn)

        def work(start: int, stop: int) -> tuple[TileSums | None, int, Encoded | None]:
            delta = None if deltas is None else deltas.rows(start, stop)
            own = gain if gain is None or len(gain) == 1 else gain[start:stop]
            part, values = weight[start:stop], result[start:stop]
            measure = self.meter is not None and deltas is not None
            sums = merge_tile(part, delta, own, values, measure=measure)
            known = deltas is None or (sums is not None and math.isfinite(sums.error))
            encoded = None
            if self.recorder is not None:
                encoded = self.recorder.encode(part, delta, own, values)
            return sums, 0 if known else _overflown(part, values), encoded

        elements = _PLAIN_TILE_ELEMENTS if self.recorder is None else TILE_ELEMENTS
        tiles = over_tiles(work, len(weight), weight.shape[1], elements)
        self._refuse_overflow(sum(overflown for _, overflown, _ in tiles), result.dtype)
        for sums, _, encoded in tiles:
            if self.meter is not None and sums is not None:
                self.meter.add(self.edit.name, sums)
            if self.recorder is not None:
                self.recorder.keep(encoded)

    def _refuse_overflow(self, count: int, dtype: numpy.dtype[Any]) -> None:
        if count:
            first = self.edit.terms[0]
            raise UnsupportedError(
                f"merged into {printable(self.edit.name)}, {count} weights exceed "
                f"the range of {dtype_name(dtype)}",
                path=self.adapters[first.adapter].path,
                hint="give a smaller --weight, or correct lora_alpha",
            )


def _overflown(weight: Array, merged: Array) -> int:
    """Count merged weights that are not finite where the base's are; float16 saturates."""
    if all_finite(merged):
        return 0
    return int(numpy.count_nonzero(numpy.isfinite(weight) & ~numpy.isfinite(merged)))


def _finite_as_stored(tensor: DenseTensor) -> Array:
    values = tensor.array()
    finite(tensor, values)
    return values


def _blend(original: Array | None, new: Array, weight: float) -> Array:
    if weight == 1 or original is None:
        return new
    before = original.astype(numpy.float32)
    change = new.astype(numpy.float32)
    change -= before
    change *= weight
    change += before
    return change


class BufferPool:
    """Hands out byte buffers and takes them back; free ones are at most twice the largest seen.

    Fresh memory costs a page fault for every 4 KiB, more than the arithmetic of a merge does.

    Examples
    --------
    >>> pool = BufferPool()
    >>> first = pool.take(2 << 20)
    >>> pool.give(first)
    >>> pool.take(2 << 20) is first
    True
    """

    def __init__(self) -> None:
        self._free: deque[Array] = deque()
        self._largest = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Array:
        """Return a flat uint8 array of at least ``nbytes``, with anything in it."""
        with self._lock:
            self._largest = max(self._largest, nbytes)
            fitting = [b for b in self._free if nbytes <= len(b) <= 2 * nbytes]
            if fitting:
                best = min(fitting, key=len)
                self._free = deque(b for b in self._free if b is not best)
                return best
        return numpy.empty(nbytes, numpy.uint8)

    def give(self, buffer: Array) -> None:
        """Take a buffer back; nothing may look at it any more."""
        if len(buffer) < _LEAST_BUFFER:
            return
        with self._lock:
            self._free.append(buffer)
            while sum(map(len, self._free)) > 2 * self._largest + _SPARE_BYTES:
                self._free.popleft()


def requantized(
    merged: DenseTensor, source: LazyTensor, like: NF4Tensor, meter: Meter
) -> NF4Tensor:
    """Return a merged weight in NF4, quantized as ``like``.

    The meter takes what is left of the delta, measured against ``source``, the weight before.
    """
    policy = QuantizationPolicy(like.block_size, like.double_quant)
    model_type = "gpt2" if like.transposed else None
    again = quantized(merged, policy, model_type)

    def load() -> NF4Parts:
        data = merged.load()
        fixed = replace(merged, load=lambda: data)
        parts = quantized(fixed, policy, model_type).load()
        result = replace(again, load=lambda: parts)
        whole = [_numbers(tensor) for tensor in (source, fixed, result)]
        for start, stop in row_tiles(len(whole[0]), whole[0].shape[1], TILE_ELEMENTS):
            before, wanted, after = (v[start:stop].astype(numpy.float32) for v in whole)
            meter.add(merged.name, meter.compare(before, wanted, after, before))
        return parts

    return replace(again, load=load)


def _numbers(tensor: LazyTensor) -> Array:
    dense = tensor.dequantize("F32") if isinstance(tensor, NF4Tensor) else tensor.array()
    return dense.reshape(-1, tensor.shape[-1])
