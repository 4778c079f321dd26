"""Undoing a merge: exactly with its undo record, approximately without."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from loraformat import plugins
from loraformat.adapter import Adapter
from loraformat.checkpoint import Checkpoint, DenseTensor, LazyTensor, tensor_view
from loraformat.dtypes import torch_dtype
from loraformat.errors import FormatError, InputError, UnsupportedError, UsageError, printable
from loraformat.folder import Folder
from loraformat.hub import resolve
from loraformat.layout import DEFAULT_SHARD_LIMIT
from loraformat.mapped import MappedFile
from loraformat.ops.merge import merge
from loraformat.plugins import WriteOptions
from loraformat.publish_file import open_publication
from loraformat.undo import UndoRecord, UndoTensor, parse_record, part_names
from loraformat.version import __version__

__all__ = ["UnmergeReport", "unmerge"]

#: Root mean square of rounding, relative to a weight, for one bit of significand: ulp / √12 over
#: a mantissa's range. Two roundings, and some room.
_ROUNDING = 0.6
_SIGNIFICAND_BITS = {"BF16": 8, "F16": 11, "F32": 24}


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What undoing a merge did.

    Attributes
    ----------
    source, target : str
    exact : bool
        Every byte is the original's, proven by hash.
    tensors, restored : int
        All tensors of the output, and those that the merge had changed.
    expected_error : float
        Of an approximate one: what ‖W − original‖ / ‖W‖ may be; else 0.
    output_bytes : int
    notes : list of str
    seconds : float
    dry_run : bool
    """

    source: str
    target: str
    exact: bool
    tensors: int
    restored: int
    expected_error: float = 0.0
    output_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return asdict(self)


def unmerge(
    merged: str | Path,
    target: str | Path,
    *,
    undo: str | Path | None = None,
    adapters: Sequence[str | Path | Adapter] = (),
    weights: Sequence[float] = (),
    to_format: str | None = None,
    shard_limit: int = DEFAULT_SHARD_LIMIT,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UnmergeReport:
    """Take merged adapters out of a model again.

    Parameters
    ----------
    merged : str or Path
        What `merge` wrote. Of several merges the last one is undone first.
    target : str or Path
        The output directory.
    undo : str or Path, optional
        The merge's record: the output is the original, bit by bit, or there is none.
    adapters : sequence of str, Path or Adapter
        With a record, where the adapters are now, if not where they were. Without one, what
        to subtract.
    weights : sequence of float
        Without a record: one per adapter, 1 by default.
    to_format : str, optional
        Converter name; dense safetensors by default.
    shard_limit, force, dry_run, progress
        As in `merge`.

    Returns
    -------
    UnmergeReport

    Raises
    ------
    FormatError
        If the record, the model or an adapter is not the one that belongs to the others.
    """
    if undo is None:
        return _subtract(
            merged, target, list(adapters), list(weights), to_format=to_format,
            shard_limit=shard_limit, force=force, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
    if weights:
        raise UsageError("the undo record knows the weights; leave out --weight")
    began = time.perf_counter()
    found = resolve(merged)
    reader = plugins.sniff(found.path)
    writer = plugins.for_output(Path(target), to_format or "safetensors")
    if writer.stores != "dense":
        raise UsageError(f"{writer.name} stores NF4, and the original's weights are dense")
    if reader.read is None:
        raise UsageError(f"format {reader.name!r} can be written but not read")
    with ExitStack() as stack:
        checkpoint = stack.enter_context(reader.read(found.path))
        path = Path(undo)
        file = MappedFile(Folder(path.absolute().parent), path.name)
        stack.callback(file.close)
        record = parse_record(file.header.metadata, path)
        undoing = _Undoing(checkpoint, record, file)
        original = undoing.checkpoint()
        undoing.adapters = _adapters(stack, original, record, adapters)
        report = UnmergeReport(
            source=str(merged),
            target=str(target),
            exact=True,
            tensors=len(original.tensors),
            restored=sum(tensor.mode != "new" for tensor in record.tensors.values()),
            output_bytes=sum(tensor.nbytes for tensor in original.tensors.values()),
            dry_run=dry_run,
        )
        if dry_run:
            return report
        total, done = report.output_bytes, 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        states = [source.stat() for source in (*checkpoint.sources, path)]
        plan = json.dumps(
            [__version__, "unmerge", writer.name, shard_limit,
             [[state.st_size, state.st_mtime_ns] for state in states]]
        )  # fmt: skip
        inputs = [checkpoint.path, *checkpoint.sources, path]
        assert writer.write is not None
        with open_publication(
            writer.output, Path(target), plan=plan, inputs=inputs, force=force
        ) as output:
            written = writer.write(original, output, WriteOptions(shard_limit, count))
            undoing.check(written.shards.tensors)
            checkpoint.close()
            output.commit()
    return replace(
        report,
        output_bytes=written.nbytes,
        notes=written.notes,
        seconds=time.perf_counter() - began,
    )


def _adapters(
    stack: ExitStack,
    original: Checkpoint,
    record: UndoRecord,
    given: Sequence[str | Path | Adapter],
) -> list[Adapter]:
    """Open the record's adapters, and compare them with it."""
    from loraformat.ops.undo_recorder import adapter_digest

    if given and len(given) != len(record.adapters):
        raise UsageError(f"{len(given)} adapters, the record is of {len(record.adapters)}")
    if not any(tensor.terms for tensor in record.tensors.values()):
        return []
    opened = []
    for number, known in enumerate(record.adapters):
        source = given[number] if given else known.path
        try:
            adapter = _open(stack, source, original)
        except InputError as error:
            error.hint = error.hint or "say where the adapter is now with --adapter"
            raise
        if adapter_digest(adapter) != known.sha256:
            raise FormatError(
                "U05", "is not the adapter that was merged, or was changed since",
                path=adapter.path, hint="say where the right one is with --adapter",
            )  # fmt: skip
        opened.append(adapter)
    return opened


def _open(stack: ExitStack, source: str | Path | Adapter, base: Checkpoint) -> Adapter:
    if isinstance(source, Adapter):
        return source
    from loraformat.ops.adapters import open_adapter

    return stack.enter_context(open_adapter(source, base=base))


class _Undoing:
    """Restores the tensors of one record, lazily."""

    def __init__(self, merged: Checkpoint, record: UndoRecord, file: MappedFile) -> None:
        self.merged, self.record, self.file = merged, record, file
        self.adapters: list[Adapter] = []
        known = {*record.tensors, *record.unchanged}
        if known != set(merged.tensors):
            odd = min(known.symmetric_difference(merged.tensors))
            raise FormatError(
                "U04", f"the record and the model do not belong together: {printable(odd)} is in "
                "one of them only",
                path=merged.path, hint="undo later merges first",
            )  # fmt: skip

    def checkpoint(self) -> Checkpoint:
        """Return the original."""
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in self.merged.tensors.items():
            undo = self.record.tensors.get(name)
            if not isinstance(tensor, DenseTensor):
                raise FormatError(
                    "U04", f"tensor {printable(name)} is in NF4 and was dense when it was merged",
                    path=self.merged.path,
                )  # fmt: skip
            if undo is None:
                tensors[name] = replace(tensor, load=self._verified(tensor))
            elif undo.mode != "new":
                tensors[name] = self._restored(tensor, undo)
        config = None if self.record.config is None else self.record.config.encode()
        return replace(self.merged, tensors=tensors, config=config)

    def _verified(self, tensor: DenseTensor) -> Callable[[], memoryview]:
        wanted = self.record.unchanged[tensor.name]
        return lambda: self._checked(tensor, wanted)

    def _checked(self, tensor: DenseTensor, wanted: str) -> memoryview:
        data = tensor.load()
        if sha256(data).hexdigest() != wanted:
            raise FormatError(
                "U06", f"tensor {printable(tensor.name)} is not as the merge left it",
                path=self.merged.path,
                hint="undo later merges first, with their own records",
            )  # fmt: skip
        return data

    def _restored(self, tensor: DenseTensor, undo: UndoTensor) -> DenseTensor:
        def load() -> memoryview:
            data = self._checked(tensor, undo.merged_sha256)
            restored = self._restore(tensor, undo, data)
            if len(restored) != made.nbytes or sha256(restored).hexdigest() != undo.sha256:
                raise FormatError(
                    "U07", f"tensor {printable(tensor.name)} did not come back as it was",
                    path=self.file.path, hint="the record is damaged",
                )  # fmt: skip
            return restored

        made = DenseTensor(tensor.name, undo.dtype, undo.shape, load, tensor.release)
        return made

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
        import torch

        from loraformat.interval_code import Unmergeable, decode_tile
        from loraformat.ops.edits import Term
        from loraformat.ops.merged import block_matrices, for_each, tiles

        try:
            terms = [
                Term(**{**term, "rows": tuple(term["rows"]) if term["rows"] else None})
                for term in undo.terms
            ]
            matrices = block_matrices(undo.shape, terms, self.adapters)
            merged = tensor_view(data, tensor.dtype, undo.shape)
            restored = torch.empty(undo.shape, dtype=torch_dtype(undo.dtype))
            columns = undo.shape[-1] if undo.shape else 1
            rows = undo.shape[-2] if len(undo.shape) > 1 else 1
            gains = tensor_view(self._part(tensor.name, 2), "F32")
            lengths = tensor_view(self._part(tensor.name, 3), "I64").tolist()
            stacks = (t.view(-1, rows, columns) for t in (merged, restored))
            for source, result, matrix in zip(*stacks, matrices, strict=True):
                deltas, gain = None, None
                if matrix is not None:
                    own = []
                    for b, _, _, magnitude in matrix.factors:
                        if magnitude is not None:
                            own.append(gains[: len(b)])
                            gains = gains[len(b) :]
                    deltas, gain = matrix.combined(own, exact=True)
                pieces = list(tiles(rows, columns, self.record.tile_elements))
                ends = list(accumulate(lengths[: len(pieces)], initial=0))
                lengths = lengths[len(pieces) :]

                def work(
                    number: int,
                    source: torch.Tensor = source,
                    result: torch.Tensor = result,
                    deltas: Any = deltas,
                    gain: Any = gain,
                    pieces: list[tuple[int, int]] = pieces,
                    bits: memoryview = residual,
                    ends: list[int] = ends,
                ) -> None:
                    start, stop = pieces[number]
                    delta = torch.zeros(()) if deltas is None else deltas.rows(start, stop)
                    part = gain if gain is None or len(gain) == 1 else gain[start:stop]
                    decode_tile(
                        source[start:stop], delta, part, result.dtype,
                        bits[ends[number] : ends[number + 1]], result[start:stop],
                    )  # fmt: skip

                for_each(work, len(pieces))
                residual = residual[ends[-1] :]
            zeros = tensor_view(self._part(tensor.name, 1), "I64")
            restored.view(-1)[zeros] = -0.0
        except (Unmergeable, LookupError, TypeError, RuntimeError, ValueError) as error:
            raise FormatError(
                "U08", f"what it holds of tensor {printable(tensor.name)} does not fit: "
                f"{printable(error) or 'no such interval'}",
                path=self.file.path, hint="the record is damaged",
            ) from error  # fmt: skip
        flat: Any = restored.view(-1).view(torch.uint8).numpy()
        return memoryview(flat)

    def check(self, written: Any) -> None:
        """Compare what was written, also by an interrupted run, with the record's hashes."""
        for name, facts in written.items():
            undo = self.record.tensors.get(name)
            wanted = self.record.unchanged.get(name) if undo is None else undo.sha256
            if facts.sha256 != wanted:
                raise FormatError(
                    "U07", f"tensor {printable(name)} was not written as it was",
                    path=self.file.path,
                )  # fmt: skip


def _subtract(
    merged: str | Path,
    target: str | Path,
    adapters: list[str | Path | Adapter],
    weights: list[float],
    **options: Any,
) -> UnmergeReport:
    """Merge with the negative weights: near to the original, as far as rounding lets."""
    if not adapters:
        raise UsageError("wanted --undo with the merge's record, or --adapter to subtract")
    found = resolve(merged)
    reader = plugins.sniff(found.path)
    assert reader.read is not None
    with ExitStack() as stack:
        checkpoint = stack.enter_context(reader.read(found.path))
        opened = [_open(stack, adapter, checkpoint) for adapter in adapters]
        for adapter in opened:
            _refuse_what_cannot_be_subtracted(adapter)
        touched = {name for adapter in opened for name in adapter.deltas}
        dtypes = {t.dtype for name, t in checkpoint.tensors.items() if name in touched}
    report = merge(
        merged, opened if all(isinstance(a, Adapter) for a in adapters) else adapters, target,
        weights=[-weight for weight in weights or [1.0] * len(adapters)],
        allow_base_mismatch=True, **options,
    )  # fmt: skip
    bits = min((_SIGNIFICAND_BITS.get(dtype, 8) for dtype in dtypes), default=8)
    error = _ROUNDING * 2.0**-bits
    return UnmergeReport(
        source=report.source,
        target=report.target,
        exact=False,
        tensors=report.tensors,
        restored=report.merged,
        expected_error=error,
        output_bytes=report.output_bytes,
        notes=[
            "this is not the original: the merge and the subtraction each rounded, and weights "
            f"are off by up to about {error:.1g} of their norm; only an undo record (merge "
            "--undo) restores it exactly",
            *report.warnings,
        ],
        seconds=report.seconds,
        dry_run=report.dry_run,
    )


def _refuse_what_cannot_be_subtracted(adapter: Adapter) -> None:
    kinds = {
        "DoRA, whose norms went with the original": any(
            d.magnitude for d in adapter.deltas.values()
        ),
        "replaced tensors": bool(adapter.replacements),
        "replaced rows": bool(adapter.rows),
    }
    if found := [kind for kind, present in kinds.items() if present]:
        raise UnsupportedError(
            f"has {' and '.join(found)}: no subtraction brings the original back",
            path=adapter.path,
            hint="only --undo with the merge's record does",
        )
