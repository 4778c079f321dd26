"""Layer prefetch: the next layer's pages are read while one is computed, the last are evicted.

A layer is a contiguous range of a shard, or a few. `LayerPrefetcher.enter` waits until its pages
are in memory and asks a thread for the next ones in the direction of the pass: up in the forward
pass, down in the backward pass. `LayerPrefetcher.leave` gives its pages back to the kernel. Mapped
pages are never anonymous memory, so what a step holds does not depend on the size of the base.

Which experts a layer needs is known when its router has been computed: they are parts of it, asked
for then (`LayerPrefetcher.read_part`) and read in that order while the first are multiplied. In the
backward pass those of the forward pass are asked for as soon as the layer is entered. The experts
of one layer are in memory at most.

The output head of a large vocabulary is as large as several layers, and each pass over it uses
every row once: `StreamedMatrix` prefetches and evicts its rows in the same way.

The kernel is told by ctypes, which releases the interpreter lock around each call: a thread that
reads pages does not stop the one that computes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from loraformat.train.engine.matrix import Matrix, Range, WrappedMatrix
from loraformat.train.engine.stored_weights import Span, share_of_spans

__all__ = ["IoStats", "LayerPrefetcher", "StreamedMatrix"]

#: Bytes that are asked for at a time, so that closing never waits long.
_PIECE = 32 << 20

#: Elements of the rows that are in memory for one product, and of those that are read meanwhile.
_STRETCH = 8 << 20
_FEWEST_ROWS = 64

_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # Linux 5.14


@dataclass(slots=True)
class IoStats:
    """Statistics of streaming: time waited, bytes read, layers visited.

    Attributes
    ----------
    stall_seconds : float
        How long computing waited for pages.
    bytes_read : int
        Bytes that were asked for, from the page cache or the disk.
    visits : list of int
        The layers in the order in which they were entered.
    """

    stall_seconds: float = 0.0
    bytes_read: int = 0
    visits: list[int] = field(default_factory=list)


def _merge_spans(spans: Sequence[Span]) -> list[Span]:
    """Merge byte ranges; gaps below a page are covered, too.

    Examples
    --------
    >>> _merge_spans([(None, 0, 10), (None, 10, 20), (None, 9000, 9010)])
    [(None, 0, 20), (None, 9000, 9010)]
    """
    found: list[Span] = []
    for file, begin, end in sorted(spans, key=lambda span: (id(span[0]), span[1])):
        if found and found[-1][0] is file and begin - found[-1][2] < 4096:
            found[-1] = (file, found[-1][1], max(found[-1][2], end))
        else:
            found.append((file, begin, end))
    return found


def _mapped(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Yield the address of each range; none where files are read instead of mapped."""
    for file, begin, end in _merge_spans(spans):
        if file.address is not None:
            yield file.address + begin, (file, begin, end)


@dataclass(frozen=True, slots=True)
class _Part:
    spans: Sequence[Span]
    reading: Future[None] | None


class LayerPrefetcher:
    """Prefetches the pages of layers before they are computed, and evicts them after.

    Parameters
    ----------
    layers : sequence of sequence of Span
        What each layer reads, whatever the batch.
    prefetch : bool
        Read the next layer on a thread while one is computed.
    release : bool
        Give a layer's pages back when it is left.
    drop_cache : bool
        Also drop them from the page cache, as if memory were full: for measurements.

    Attributes
    ----------
    traffic : IoStats

    Examples
    --------
    In a backward pass layers are entered and left one at a time, each once:

    >>> prefetcher = LayerPrefetcher([[], []])
    >>> for step in (prefetcher.enter_backward, prefetcher.leave_backward):
    ...     step(1)
    ...     step(1)
    >>> prefetcher.traffic.visits
    [1]
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Span]],
        *,
        prefetch: bool = True,
        release: bool = True,
        drop_cache: bool = False,
    ) -> None:
        self._layers = [list(_mapped(spans)) for spans in layers]
        self.prefetch, self.release, self.drop_cache = prefetch, release, drop_cache
        self.traffic = IoStats()
        self._pending: dict[int, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loraformat-prefetch")
        self._backward: int | None = None
        self._closed = False
        #: Of the layers that are entered, and of others what they needed the last time.
        self._parts: dict[int, dict[Hashable, _Part]] = {}
        self._last_parts: dict[int, dict[Hashable, _Part]] = {}

    def enter(self, layer: int, direction: int) -> None:
        """Wait until a layer is in memory, and have the next one of the pass (1 or -1) read."""
        self.traffic.visits.append(layer)
        self._parts.setdefault(layer, {})
        if not self.prefetch:
            return
        self._ask(layer)
        self._wait(self._pending.pop(layer))
        if direction < 0:
            for key, part in self._last_parts.get(layer, {}).items():
                self.read_part(layer, key, part.spans)
        following = layer + direction
        if 0 <= following < len(self._layers):
            self._ask(following)

    def leave(self, layer: int) -> None:
        """Evict a layer, and the parts of it that were read."""
        self._forget(self._layers[layer])
        parts = self._last_parts[layer] = self._parts.pop(layer, {})
        for part in parts.values():
            if part.reading is not None and not part.reading.cancel():
                part.reading.result()
        self._forget(list(_mapped([span for part in parts.values() for span in part.spans])))

    def read_part(self, layer: int, key: Hashable, spans: Sequence[Span]) -> None:
        """Have a part of a layer read, after those that were asked for, and evicted with the layer.

        Nothing is done unless the layer has been entered, nor a second time before it is left.
        """
        parts = self._parts.get(layer)
        if parts is not None and key not in parts:
            parts[key] = _Part(spans, self.read_ahead(spans))

    def wait_for_part(self, layer: int, key: Hashable) -> None:
        """Wait until a part of a layer is in memory, if it was asked for."""
        part = self._parts.get(layer, {}).get(key)
        if part is not None and part.reading is not None:
            self._wait(part.reading)

    def _wait(self, reading: Future[None]) -> None:
        began = time.perf_counter()
        reading.result()
        self.traffic.stall_seconds += time.perf_counter() - began

    def enter_backward(self, layer: int) -> None:
        """Have a layer's weights in memory from here on, and those of no other."""
        if layer == self._backward:
            return
        if self._backward is not None:
            self.leave(self._backward)
        self._backward = layer
        self.enter(layer, -1)

    def leave_backward(self, layer: int) -> None:
        """Evict a layer, unless that was done."""
        if layer == self._backward:
            self._backward = None
            self.leave(layer)

    def read_ahead(self, spans: Sequence[Span]) -> Future[None] | None:
        """Have bytes read that belong to no layer, some time soon."""
        if not self.prefetch or self._closed:
            return None
        return self._reader.submit(self._read, list(_mapped(spans)))

    def evict(self, spans: Sequence[Span], reading: Future[None] | None = None) -> None:
        """Evict bytes that belong to no layer.

        `reading` is what `read_ahead` returned for them: a read that lags behind would bring them
        back.
        """
        if reading is not None and not reading.cancel():
            reading.result()
        self._forget(list(_mapped(spans)))

    def _forget(self, ranges: Sequence[tuple[int, Span]]) -> None:
        if not self.release and not self.drop_cache:
            return
        for address, (file, begin, end) in ranges:
            forget_pages(address, end - begin)
            if self.drop_cache:
                drop_cached(file.descriptor, begin, end - begin)

    def _ask(self, layer: int) -> None:
        if layer not in self._pending:
            self._pending[layer] = self._reader.submit(self._read, self._layers[layer])

    def _read(self, ranges: Sequence[tuple[int, Span]]) -> None:
        for address, (_, begin, end) in ranges:
            for start in range(0, end - begin, _PIECE):
                if self._closed:
                    return
                read_pages(address + start, min(_PIECE, end - begin - start))
            self.traffic.bytes_read += end - begin

    def close(self) -> None:
        """Stop reading; nothing may be entered after."""
        self._closed = True
        self._reader.shutdown(wait=True, cancel_futures=True)


class StreamedMatrix(WrappedMatrix):
    """A matrix whose pages are prefetched and evicted with its rows while it is streaming.

    Of each of its `spans` of bytes a share goes with the rows, as it is with dense numbers, packed
    codes and scales.
    """

    def __init__(self, matrix: Matrix, spans: Sequence[Span], prefetcher: LayerPrefetcher) -> None:
        super().__init__(matrix)
        self._spans, self._prefetcher = spans, prefetcher
        self._streaming = False

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Evict pages as soon as they are used, inside this block."""
        self._streaming = True
        try:
            yield
        finally:
            self._streaming = False

    def row_chunks(self) -> Iterator[Range]:
        """Yield a few rows at a time while it is streaming, else what the matrix yields."""
        if not self._streaming:
            yield from self.matrix.row_chunks()
            return
        step = max(_FEWEST_ROWS, _STRETCH // max(self.columns, 1))
        reading = None
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            coming = self._prefetcher.read_ahead(self._of_rows(stop, min(stop + step, self.rows)))
            yield start, stop
            self._prefetcher.evict(self._of_rows(start, stop), reading)
            reading = coming

    def _of_rows(self, start: int, stop: int) -> list[Span]:
        return share_of_spans(self._spans, start, stop, self.rows)


@cache
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def _pages(address: int, nbytes: int) -> tuple[int, int]:
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    return first, -(-(address + nbytes - first) // mmap.PAGESIZE) * mmap.PAGESIZE


def read_pages(address: int, nbytes: int) -> None:
    """Bring bytes of a file mapping into memory; an older kernel is asked to do so in time."""
    if (libc := _libc()) is None or not nbytes:
        return
    first, length = _pages(address, nbytes)
    if libc.madvise(first, length, _MADV_POPULATE_READ):
        libc.madvise(first, length, _MADV_WILLNEED)


def forget_pages(address: int, nbytes: int) -> None:
    """Release the pages of a read-only, shared file mapping; the next access reads them again.

    Never of other memory, which would become zero.
    """
    if (libc := _libc()) is not None and nbytes:
        libc.madvise(*_pages(address, nbytes), _MADV_DONTNEED)


def drop_cached(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to drop a range of a file from its page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
