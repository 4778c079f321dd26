"""Lazy restoration of tensors from an undo record."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import accumulate
from typing import Any

import numpy

from loraformat.errors import FormatError, UnsupportedError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.ops.merge.deltas import LowRankUpdate, block_matrices, over_tiles
from loraformat.ops.merge.plan import DeltaTerm
from loraformat.tensors.arrays import Array, array_bytes, array_view, numpy_dtype
from loraformat.tensors.mapped import MappedFile
from loraformat.undo.interval_code import Unmergeable, decode_tile
from loraformat.undo.record import UndoRecord, UndoTensor, part_names
from loraformat.undo.rules import tile_rows

__all__ = ["Undoing"]


class Undoing:
    """Lazy restoration of a merged model's original.

    Parameters
    ----------
    merged : Checkpoint
    record : UndoRecord
    file : MappedFile
        Of the record.

    Attributes
    ----------
    adapters : list of Adapter
        Those of the record, in its order; to be set before a tensor is loaded.

    Raises
    ------
    FormatError
        U04, if they do not belong together; U06 to U11 when a tensor is loaded.
    """

    def __init__(self, merged: Checkpoint, record: UndoRecord, file: MappedFile) -> None:
        self.merged, self.record, self.file = merged, record, file
        self.adapters: list[Adapter] = []
        self._dense: dict[str, DenseTensor] = {}
        known = {*record.tensors, *record.unchanged}
        if known != set(merged.tensors):
            odd = min(known.symmetric_difference(merged.tensors))
            where = "the record" if odd in known else "the model"
            raise self._foreign(f"{printable(odd)} is in {where} only")
        for name, tensor in merged.tensors.items():
            if not isinstance(tensor, DenseTensor):
                raise self._foreign(f"{printable(name)} is in NF4 but was dense when it was merged")
            self._dense[name] = tensor
        for name, undo in record.tensors.items():
            tensor = self._dense[name]
            kept = undo.mode in ("interval", "rows")
            if kept and tensor.shape != undo.shape:
                raise self._foreign(
                    f"{printable(name)} has the shape {list(tensor.shape)}, wanted "
                    f"{list(undo.shape)}"
                )
            wanted = {"interval": ("F32", "F16", "BF16"), "rows": (undo.dtype,)}.get(undo.mode)
            if wanted is not None and tensor.dtype not in wanted:
                raise self._foreign(f"{printable(name)} is {tensor.dtype}")

    def _foreign(self, what: str) -> FormatError:
        return FormatError(
            "U04",
            f"the undo record and the model do not match: {what}",
            path=self.merged.path,
            hint="undo later merges first, each with its own undo record",
        )

    def _damaged(self, rule: str, name: str, what: str) -> FormatError:
        return FormatError(
            rule, f"what it holds of tensor {printable(name)} does not fit: {what}",
            path=self.file.path, hint="the record is damaged",
        )  # fmt: skip

    def checkpoint(self) -> Checkpoint:
        """Return the original, whose tensors are restored when loaded."""
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in self._dense.items():
            undo = self.record.tensors.get(name)
            if undo is None:
                tensors[name] = replace(tensor, load=partial(self._unchanged, tensor))
            elif undo.mode != "new":
                tensors[name] = self._restored(tensor, undo)
        config = None if self.record.config is None else self.record.config.encode()
        return replace(self.merged, tensors=tensors, config=config)

    def _unchanged(self, tensor: DenseTensor) -> memoryview:
        data = tensor.load()
        self._compare(tensor, self.record.unchanged[tensor.name], sha256(data).hexdigest())
        return data

    def _compare(self, tensor: DenseTensor, wanted: str, found: str) -> None:
        if found != wanted:
            raise FormatError(
                "U06", f"tensor {printable(tensor.name)} was changed since the merge",
                path=self.merged.path,
                hint="undo later merges first, each with its own undo record",
            )  # fmt: skip

    def _restored(self, tensor: DenseTensor, undo: UndoTensor) -> DenseTensor:
        def load() -> memoryview:
            data = tensor.load()
            with ThreadPoolExecutor(1) as beside:  # hashing takes as long as restoring
                found = beside.submit(lambda: sha256(data).hexdigest())
                try:
                    restored = self._restore(tensor, undo, data)
                finally:  # if it is another model, that is why it could not be restored
                    self._compare(tensor, undo.merged_sha256, found.result())
            if sha256(restored).hexdigest() != undo.sha256:
                raise FormatError(
                    "U07", f"tensor {printable(tensor.name)} was not restored exactly",
                    path=self.file.path, hint="the record is damaged",
                )  # fmt: skip
            return restored

        return DenseTensor(tensor.name, undo.dtype, undo.shape, load, tensor.release)

    def _part(self, name: str, number: int) -> memoryview:
        part = part_names(name)[number]
        return self.file.view(part) if part in self.file.header.entries else memoryview(b"")

    def _restore(self, tensor: DenseTensor, undo: UndoTensor, data: memoryview) -> memoryview:
        residual = self._part(tensor.name, 0)
        if undo.mode == "raw":
            return residual
        if undo.mode == "rows":
            whole = bytearray(data)
            width = len(whole) // max(undo.shape[0], 1)
            for number, row in enumerate(undo.rows):
                whole[row * width : (row + 1) * width] = residual[
                    number * width : (number + 1) * width
                ]
            return memoryview(whole)
        return self._from_intervals(tensor, undo, data, residual)

    def _from_intervals(
        self, tensor: DenseTensor, undo: UndoTensor, data: memoryview, residual: memoryview
    ) -> memoryview:
        name = tensor.name
        matrices = self._matrices(name, undo)
        ends = self._ends(name, len(residual))
        gains = self._gains(name, matrices)
        stack, rows, columns, step = tile_rows(undo.shape, self.record.tile_elements)
        per_matrix = -(-rows // step)
        merged = array_view(data, tensor.dtype, (stack, rows, columns))
        restored = numpy.empty((stack, rows, columns), numpy_dtype(undo.dtype))
        for number, matrix in enumerate(matrices):
            own = ends[number * per_matrix : (number + 1) * per_matrix + 1]
            try:
                _decode_matrix(
                    merged[number], restored[number], matrix, gains[number], residual, own, step
                )
            except Unmergeable:
                raise self._damaged("U08", name, "no such interval") from None
            except UnsupportedError as error:
                raise self._damaged("U10", name, str(error)) from error
        flat = restored.reshape(-1)
        flat[self._zeros(name, len(flat))] = -0.0
        return array_bytes(flat)

    def _matrices(self, name: str, undo: UndoTensor) -> list[LowRankUpdate | None]:
        """Return the update of each matrix, after the checks of U10."""
        terms = [DeltaTerm(**term) for term in undo.terms]
        stack, rows, columns, _ = tile_rows(undo.shape, self.record.tile_elements)
        for term in terms:
            if problem := self._misfit(term, stack):
                raise self._damaged("U10", name, problem)
        known = {(t.adapter, t.target, t.part, t.block, t.expert) for t in terms}
        if len(known) < len(terms):
            raise self._damaged("U10", name, "a term occurs twice")
        try:
            matrices = list(block_matrices(undo.shape, terms, self.adapters))
        except UnsupportedError as error:
            raise self._damaged("U10", name, str(error)) from error
        for matrix in matrices:
            for factors in () if matrix is None else matrix.terms:
                shape = len(factors.b), factors.a.shape[1]
                shape = shape[::-1] if matrix is not None and matrix.transposed else shape
                if shape != (rows, columns):
                    raise self._damaged("U10", name, f"a delta of {shape}")
        return matrices

    def _misfit(self, term: DeltaTerm, stack: int) -> str:
        """Return what a term refers to that does not exist; None if all exists."""
        if term.adapter >= len(self.adapters):
            return f"adapter {term.adapter}"
        delta = self.adapters[term.adapter].deltas.get(term.target)
        if delta is None:
            return f"delta {printable(term.target)}"
        if term.block >= stack:
            return f"matrix {term.block}"
        if term.part == "bias":
            return "a bias" if delta.bias is None else ""
        experts = delta.a.shape[0] if len(delta.a.shape) == 3 else None
        if term.expert is None or experts is None:
            exists = term.expert is None and experts is None
        else:
            exists = term.expert < experts
        if not exists:
            return f"expert {term.expert}"
        if term.rows and not term.rows[0] <= term.rows[1] <= delta.out_features:
            return f"rows {term.rows}"
        return ""

    def _ends(self, name: str, nbytes: int) -> list[int]:
        """Return the start offsets of the tiles' codes, and the end."""
        lengths = array_view(self._part(name, 3), "I64").tolist()
        if min(lengths, default=0) < 0 or sum(lengths) != nbytes:
            raise self._damaged("U09", name, "lengths of tiles")
        return list(accumulate(lengths, initial=0))

    def _gains(self, name: str, matrices: list[LowRankUpdate | None]) -> list[list[Array]]:
        """Return the DoRA gains of each matrix's terms."""
        whole = array_view(self._part(name, 2), "F32")
        counts = [
            [len(t.b) for t in matrix.terms if t.magnitude is not None] if matrix else []
            for matrix in matrices
        ]
        if sum(map(sum, counts)) != len(whole):
            raise self._damaged("U09", name, f"{len(whole)} gains")
        ends = accumulate(count for own in counts for count in own)
        pieces = iter(numpy.split(whole, list(ends)))
        return [[next(pieces) for _ in own] for own in counts]

    def _zeros(self, name: str, count: int) -> Array:
        zeros = array_view(self._part(name, 1), "I64")
        if len(zeros) and not (
            (zeros[1:] > zeros[:-1]).all() and zeros[0] >= 0 and zeros[-1] < count
        ):
            raise self._damaged("U11", name, "positions of zeros")
        return zeros

    def check(self, written: Any) -> None:
        """Compare the written tensors with the record's hashes."""
        for name, facts in written.items():
            undo = self.record.tensors.get(name)
            wanted = self.record.unchanged.get(name) if undo is None else undo.sha256
            if facts.sha256 != wanted:
                raise FormatError(
                    "U07", f"tensor {printable(name)} was not written as it was",
                    path=self.file.path,
                )  # fmt: skip


def _decode_matrix(
    merged: Array,
    restored: Array,
    matrix: LowRankUpdate | None,
    gains: list[Array],
    residual: memoryview,
    ends: list[int],
    step: int,
) -> None:
    """Decode a matrix into `restored`, tile by tile, on all CPUs."""
    deltas, gain = (None, None) if matrix is None else matrix.combined(gains, exact=True)

    def work(start: int, stop: int) -> None:
        delta = numpy.zeros((), numpy.float32) if deltas is None else deltas.rows(start, stop)
        own = gain if gain is None or len(gain) == 1 else gain[start:stop]
        number = start // step
        bits = residual[ends[number] : ends[number + 1]]
        decode_tile(merged[start:stop], delta, own, restored.dtype, bits, restored[start:stop])

    over_tiles(work, len(merged), merged.shape[1], step * merged.shape[1])
