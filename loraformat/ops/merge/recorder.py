"""Recording of undo information during a merge, and the file that it is published in."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy

from loraformat.errors import LoraFormatError, OutputError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.written import WrittenModel
from loraformat.ops.deltas.spool import Spool
from loraformat.ops.merge.deltas import TILE_ELEMENTS
from loraformat.ops.merge.plan import DeltaTerm, TensorEdit
from loraformat.ops.merge.report import UndoSummary
from loraformat.storage.atomic_file import AtomicFile
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import sync_directory, write_all
from loraformat.storage.output_rules import refuse_input_as_output
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.arrays import Array, array_bytes
from loraformat.tensors.mapped import MappedFile
from loraformat.undo.interval_code import Unmergeable, encode_tile
from loraformat.undo.record import (
    METADATA_KEY,
    AdapterRecord,
    UndoRecord,
    UndoTensor,
    encode_record,
    part_names,
)
from loraformat.version import __version__

__all__ = [
    "Encoded", "RecordPublication", "UndoRecorder", "adapter_digest", "refuse_record_path",
    "write_record",
]  # fmt: skip

_REPLACED = ".replaced"
_ANOTHER = "choose another file"
#: Of a tile: elements, the bits of its ranks, the positions of negative zeros.
Encoded: TypeAlias = tuple[int, bytes, Array]


@dataclass(slots=True)
class _Kept:
    residual: list[tuple[int, int]] = field(default_factory=list)
    zeros: list[Array] = field(default_factory=list)
    gains: list[Array] = field(default_factory=list)
    elements: int = 0


class UndoRecorder:
    """Recorder of what is needed to undo the edit of one tensor.

    ``dtype`` is the output's; None keeps the source's.
    """

    def __init__(
        self, edit: TensorEdit, source: LazyTensor | None, dtype: str | None, spool: Spool
    ) -> None:
        self.edit, self.source, self.spool = edit, source, spool
        self.mode = self._mode(dtype)
        self.digest = ""
        self.rows: list[int] = []
        self._kept = _Kept()

    def _mode(self, dtype: str | None) -> str:
        edit, source = self.edit, self.source
        if source is None or edit.source != edit.name:
            return "new"
        if edit.height is not None or edit.in_turn:
            return "raw"  # version 1 of the record knows one shape, and terms that do not follow
        if edit.replacement is not None or any(term.into is not None for term in edit.terms):
            return "raw"  # version 1 of the record has no word for a part of a matrix
        if edit.rows:
            cast = dtype is not None and dtype != source.dtype
            return "raw" if cast or edit.terms else "rows"
        return "interval"

    def gains(self, gains: Sequence[Array]) -> None:
        """Take the gains of a matrix' DoRA terms, float32, before its tiles."""
        self._kept.gains.extend(gains)

    def encode(
        self, weight: Array, delta: Array | None, gain: Array | None, merged: Array
    ) -> Encoded | None:
        """Encode what is lost of a tile, in any thread; None if an interval cannot.

        Arguments are those of `loraformat.undo.interval_code.encode_tile`; no delta is zero.
        """
        if self.mode != "interval":
            return None
        delta = numpy.zeros((), numpy.float32) if delta is None else delta
        try:
            return merged.size, *encode_tile(weight, delta, gain, merged)
        except Unmergeable:
            return None

    def keep(self, encoded: Encoded | None) -> None:
        """Keep what `encode` returned of the next tile."""
        if self.mode != "interval":
            return
        if encoded is None:
            self.mode = "raw"
            return
        elements, bits, zeros = encoded
        self._kept.residual.append(self.spool.append(bits))
        self._kept.zeros.append(zeros + self._kept.elements)
        self._kept.elements += elements
        if 8 * sum(map(len, self._kept.zeros)) > self._kept.elements + 4096:
            self.mode = "raw"  # a list of zeros longer than a byte per weight

    def finish(self, source: memoryview, rows: Sequence[int] = ()) -> None:
        """Record the original's hash, and the parts that cannot be computed."""
        if self.mode == "new":
            return
        self.digest = sha256(source).hexdigest()
        if self.mode == "raw":
            self._kept = _Kept([self.spool.append(source)])
        elif self.mode == "rows":
            self.rows = sorted(set(rows))
            width = len(source) // self.source.shape[0] if self.source is not None else 0
            pieces = [source[row * width : (row + 1) * width] for row in self.rows]
            self._kept.residual = [self.spool.append(piece) for piece in pieces]

    def parts(self) -> list[list[tuple[int, int]]]:
        """Return the offsets of the parts, in the order of `part_names`."""
        kept = self._kept
        if self.mode != "interval":
            return [kept.residual, [], [], []]
        zeros = [self.spool.append(array_bytes(z)) for z in kept.zeros if len(z)]
        gains = [self.spool.append(array_bytes(g)) for g in kept.gains]
        lengths = numpy.array([length for _, length in kept.residual], numpy.int64)
        return [kept.residual, zeros, gains, [self.spool.append(array_bytes(lengths))]]

    def describe(self, merged_sha256: str) -> UndoTensor:
        """Return the record's entry."""
        original = None if self.mode == "new" else self.source
        return UndoTensor(
            mode=self.mode,
            dtype="" if original is None else original.dtype,
            shape=() if original is None else original.shape,
            sha256=self.digest,
            merged_sha256=merged_sha256,
            terms=[_described(t) for t in self.edit.terms] if self.mode == "interval" else [],
            rows=self.rows,
        )


def _described(term: DeltaTerm) -> dict[str, Any]:
    members = asdict(term)
    del members["into"]
    return members


def adapter_digest(adapter: Adapter) -> str:
    """Return the SHA-256 of an adapter's names, scalings and factors."""
    digest = sha256()
    for target, delta in sorted(adapter.deltas.items()):
        digest.update(f"{target}\0{delta.scaling!r}\0{delta.orientation}\0".encode())
        for tensor in (delta.a, delta.b, delta.magnitude, delta.bias):
            if tensor is None:
                digest.update(b"none\0")
                continue
            digest.update(f"{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            digest.update(tensor.load())
    return digest.hexdigest()


def write_record(
    output: AtomicOutput,
    original: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    recorders: Mapping[str, UndoRecorder],
    written: WrittenModel,
) -> UndoSummary:
    """Write the record of a merge to its work directory, from the recorders of its tensors."""
    digests = {name: record.sha256 for name, record in written.shards.tensors.items()}
    record = UndoRecord(
        created_by=f"loraformat {__version__}",
        tile_elements=TILE_ELEMENTS,
        adapters=[
            AdapterRecord(str(adapter.path), adapter_digest(adapter), weight)
            for adapter, weight in zip(adapters, weights, strict=True)
        ],
        tensors={name: r.describe(digests[name]) for name, r in recorders.items()},
        unchanged={name: digest for name, digest in digests.items() if name not in recorders},
        config=None if original.config is None else original.config.decode("utf-8"),
    )
    pieces: dict[str, list[tuple[int, int]]] = {}
    for name, recorder in recorders.items():
        pieces |= {
            part: kept
            for part, kept in zip(part_names(name), recorder.parts(), strict=True)
            if kept
        }
    sizes = {part: sum(length for _, length in kept) for part, kept in pieces.items()}
    header, _ = encode_record(record, sizes)
    spool = next(iter(recorders.values())).spool
    with output.create(output.file_name) as file:
        write_all(file, header)
        for kept in pieces.values():
            for piece in kept:
                spool.copy(piece, file)
    merged = sum(prod(written.shards.tensors[name].shape) for name in recorders)
    nbytes = len(header) + sum(sizes.values())
    return UndoSummary(str(output.target), nbytes, 8 * nbytes / max(merged, 1))


def refuse_record_path(path: Path, target: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Check before a merge that its undo record can be written.

    Parameters
    ----------
    path : Path
        Of the record.
    target : Path
        The merged model. Where an interrupted merge to it waits to be continued, its record may
        stand already.
    inputs : sequence of Path
        The base, the adapters and their files.
    force : bool
        Replace an undo record.

    Raises
    ------
    OutputError
        If the path is or lies in an input or the output, or something stands there that is not
        an undo record, or one does and neither ``force`` nor an interrupted merge allows it.
    """
    path, target = Path(os.path.abspath(path)), Path(os.path.abspath(target))
    refuse_input_as_output(path, path.with_name(path.name + ".partial"), inputs)
    real, output = path.resolve(), target.resolve()
    if real.is_relative_to(output) or output.is_relative_to(real):
        raise OutputError("is, contains or is inside the output", path=path, hint=_ANOTHER)
    if not path.parent.is_dir():
        raise OutputError("no such directory", path=path.parent, hint="create it first")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file() or not _is_record(path):
        raise OutputError(
            "exists, is not an undo record and will not be replaced", path=path, hint=_ANOTHER
        )
    if not force and not target.with_name(target.name + ".partial").is_dir():
        raise OutputError("already exists", path=path, hint="use --force to replace it")


def _is_record(path: Path) -> bool:
    if not path.stat().st_size:
        return True
    try:
        file = MappedFile(SafeDirectory(path.parent), path.name)
    except LoraFormatError:
        return False
    with closing(file):
        return METADATA_KEY in file.header.metadata


class RecordPublication(AtomicFile):
    """An undo record that is published together with its model.

    Parameters
    ----------
    path : Path
    model : AtomicOutput
        Of the merged model.
    inputs : sequence of Path
    force : bool

    Notes
    -----
    `commit` publishes both. A kill in between leaves the record and the model's finished shards:
    the same command continues, and accepts that record if it is the same, byte for byte. A
    failure takes the record back.
    """

    def __init__(
        self, path: Path, model: AtomicOutput, inputs: Sequence[Path], *, force: bool
    ) -> None:
        super().__init__(path, plan="undo record", inputs=inputs, force=force)
        self._model, self._sources = model, list(inputs)

    def _refuse_existing(self) -> None:
        refuse_record_path(self.target, self._model.target, self._sources, force=self._force)

    def commit(self) -> None:
        """Publish the record and the model.

        Raises
        ------
        OutputError
            If another record stands there, or the model cannot appear; neither does then.
        """
        written, replaced = self.work / self.file_name, self.work / _REPLACED
        stood = self.target.is_file()
        same = stood and filecmp.cmp(written, self.target, shallow=False)
        if stood and not same:
            if not self._force:
                raise OutputError("belongs to another merge", path=self.target, hint="use --force")
            os.rename(self.target, replaced)
        if not same:
            self._appear(written)
            sync_directory(self.target.parent)
        try:
            self._model.commit()
        except BaseException:
            if not same and not self._model.published:
                os.unlink(self.target)
                if replaced.exists():
                    os.rename(replaced, self.target)
                sync_directory(self.target.parent)
            raise
        self._remove_work()
