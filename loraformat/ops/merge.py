"""Merging: adapters into a base, tensor by tensor, into a new model.

::

    base ───── reader ──> Checkpoint ─┐
    adapters ─ open_adapter ─> edits ─┴─> Checkpoint of merged tensors ── writer ──> output
                                              └── undo record (if asked for)

The base is never changed. A weight gets all its deltas at once and is rounded once. The
output of a quantized base is dense, as what quantizing again leaves of an ordinary delta
is close to nothing; it must be asked for by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import plugins
from loraformat.adapter import Adapter
from loraformat.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.config_json import parse
from loraformat.dtypes import parse_weight_dtype
from loraformat.errors import InputError, UsageError
from loraformat.folder import Folder
from loraformat.hub import resolve
from loraformat.layout import DEFAULT_SHARD_LIMIT
from loraformat.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest
from loraformat.model_directory import WrittenModel
from loraformat.ops.edits import plan_edits
from loraformat.ops.encoding import Encoding
from loraformat.ops.merge_report import MergedAdapter, MergeReport, UndoSummary, advice
from loraformat.ops.report import losses
from loraformat.plugins import Converter, WriteOptions
from loraformat.publish_file import open_publication
from loraformat.version import __version__

if TYPE_CHECKING:
    from loraformat.ops.undo_recorder import Spool, UndoRecorder

__all__ = ["merge"]


@dataclass(frozen=True, slots=True)
class _Options:
    """What decides the bytes of the output."""

    weights: tuple[float, ...]
    dtype: str | None
    requantize: bool
    shard_limit: int


def merge(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    target: str | Path,
    *,
    weights: Sequence[float] = (),
    from_format: str | None = None,
    to_format: str | None = None,
    dtype: str | None = None,
    undo: str | Path | None = None,
    requantize: bool = False,
    allow_base_mismatch: bool = False,
    shard_limit: int = DEFAULT_SHARD_LIMIT,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge adapters into a base.

    Parameters
    ----------
    base : str or Path
        A local path, or ``org/name[@revision]`` on the Hub; any base format.
    adapters : sequence of str, Path or Adapter
        At least one. An open `Adapter` stays open.
    target : str or Path
        The output directory.
    weights : sequence of float
        One per adapter; 1 by default.
    from_format, to_format : str, optional
        Converter names, for the base and the output. The output is dense safetensors by default.
    dtype : str, optional
        ``f32``, ``f16`` or ``bf16`` for all floating tensors. By default each keeps its own,
        and what comes from a quantized base becomes bf16.
    undo : str or Path, optional
        Where to write the record from which `unmerge` restores the base bit by bit.
    requantize : bool
        Allow an output in NF4, which loses nearly all of an ordinary delta.
    allow_base_mismatch : bool
        Merge although an adapter says that it was made for another base.
    shard_limit, force, dry_run, progress
        As in `loraformat.ops.convert.convert`.

    Returns
    -------
    MergeReport

    Raises
    ------
    LoraFormatError
        Nothing appears at the target then.

    Notes
    -----
    W' = W + Σ ωᵢ sᵢ Bᵢ Aᵢ (Hu 2021, section 4.1); with DoRA (Liu 2024, equation 5)
    W' = m · (W + s B A) / ‖W + s B A‖ by output feature.
    """
    began = time.perf_counter()
    if not adapters:
        raise UsageError("no adapter to merge, wanted at least one")
    if weights and len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters, wanted one each")
    found = resolve(base)
    reader = plugins.get(from_format) if from_format else plugins.sniff(found.path)
    writer = plugins.for_output(Path(target), to_format, default="safetensors")
    _check_writer(writer, requantize, base, adapters, target)
    if reader.read is None or reader.kind != "base":
        raise UsageError(f"format {reader.name!r} is not a base that can be read")
    options = _Options(tuple(weights) or (1.0,) * len(adapters), dtype, requantize, shard_limit)
    with ExitStack() as stack:
        original = stack.enter_context(reader.read(found.path))
        opened = [
            given if isinstance(given, Adapter) else stack.enter_context(
                _open_adapter(given, original)
            )
            for given in adapters
        ]  # fmt: skip
        spool = None if undo is None else _spool(stack, Path(undo), force)
        job = _Job(original, opened, options, writer, spool)
        notes = _check_bases(found.path, reader, opened, allow_base_mismatch)
        report = MergeReport(
            source=str(base),
            target=str(target),
            source_format=reader.name,
            target_format=writer.name,
            adapters=[
                MergedAdapter(str(adapter.path), adapter.format, weight, adapter.notes)
                for adapter, weight in zip(opened, options.weights, strict=True)
            ],
            merged=sum(bool(edit.terms) for edit in job.plan.edits.values()),
            replaced=sum(bool(e.replacement or e.rows) for e in job.plan.edits.values()),
            tensors=len(job.checkpoint.tensors),
            output_bytes=sum(tensor.nbytes for tensor in job.checkpoint.tensors.values()),
            notes=[*notes, *job.plan.notes],
            lost=list(losses(original, reader, writer)),
            dry_run=dry_run,
        )
        if dry_run:
            return report
        written, summary = job.write(Path(target), undo, force, progress)
    return _completed(report, job, written, summary, time.perf_counter() - began)


def _spool(stack: ExitStack, undo: Path, force: bool) -> Spool:
    from loraformat.ops.undo_recorder import Spool, check_undo_path

    check_undo_path(undo, force)
    spool = Spool(undo.absolute().parent)
    stack.callback(spool.close)
    return spool


def _open_adapter(source: str | Path, base: Checkpoint) -> Adapter:
    from loraformat.ops.adapters import open_adapter

    return open_adapter(source, base=base)


def _check_writer(
    writer: Converter,
    requantize: bool,
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    target: str | Path,
) -> None:
    if writer.stores == "dense":
        if requantize:
            raise UsageError(f"{writer.name} stores dense weights; --requantize speaks of NF4")
        return
    if not requantize:
        first = adapters[0].path if isinstance(adapters[0], Adapter) else adapters[0]
        raise UsageError(
            f"{writer.name} stores NF4, which would lose nearly all of an ordinary delta",
            hint=f"keep the adapter beside the codes: loraformat convert {base} {target}, then "
            f"loraformat convert {first} {target}/adapters/NAME; or insist with --requantize",
        )


def _check_bases(
    path: Path, reader: Converter, adapters: Iterable[Adapter], allowed: bool
) -> list[str]:
    """Compare the base with what each adapter says of its own; return what to know."""
    notes = []
    ours = _fingerprint(path) if reader.name == "loraformat" else None
    for adapter in adapters:
        wanted = adapter.base_fingerprint
        if wanted is None:
            notes.append(f"{adapter.path}: names no base by fingerprint; only shapes were compared")
        elif ours is None:
            notes.append(
                f"{adapter.path}: was made for the base {wanted[:12]}, and a {reader.name} model "
                "has no fingerprint to compare; if it was trained on NF4, the bundle that it was "
                "trained on is the better base to merge into"
            )
        elif wanted != ours and not allowed:
            raise InputError(
                f"was made for the base {wanted[:12]}, and this one is {ours[:12]}",
                path=adapter.path,
                hint="merge into its own base, or insist with --allow-base-mismatch",
            )
        elif wanted != ours:
            notes.append(
                f"{adapter.path}: was made for the base {wanted[:12]}, and this one is "
                f"{ours[:12]}: what it learned there may not hold here"
            )
    return notes


def _fingerprint(path: Path) -> str:
    raw = Folder(path).read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(raw, path / MANIFEST_NAME).fingerprint


class _Job:
    """One merge: from the plan to the written model."""

    def __init__(
        self,
        original: Checkpoint,
        adapters: Sequence[Adapter],
        options: _Options,
        writer: Converter,
        spool: Spool | None,
    ) -> None:
        from loraformat.ops.buffers import BufferPool
        from loraformat.ops.change import Meter

        self.original, self.adapters = original, adapters
        self.options, self.writer = options, writer
        self.meter, self.pool = Meter(), BufferPool()
        self.plan = plan_edits(original, adapters, options.weights)
        self.spool = spool
        self.recorders: dict[str, UndoRecorder] | None = None if spool is None else {}
        self.dtype = self._output_dtype()
        if spool is not None:
            self._check_undo()
        self.checkpoint = self._merged()

    def _output_dtype(self) -> str | None:
        if self.options.dtype:
            return parse_weight_dtype(self.options.dtype)
        quantized = any(isinstance(t, NF4Tensor) for t in self.original.tensors.values())
        return "BF16" if quantized and self.writer.stores == "dense" else None

    def _check_undo(self) -> None:
        if self.options.requantize or any(
            isinstance(tensor, NF4Tensor) for tensor in self.original.tensors.values()
        ):
            raise UsageError(
                "an undo record restores dense weights, and this merge is from or to NF4",
                hint="keep the bundle: merging does not change it",
            )

    def _merged(self) -> Checkpoint:
        tensors: dict[str, LazyTensor] = dict(self.original.tensors)
        for name, edit in self._edits().items():
            source = None if edit.source is None else self.original.tensors[edit.source]
            tensors[name] = self._tensor(edit, source)
        config = self.original.config
        if self.plan.untied and config is not None:
            config = _untied(config)
        merged = replace(self.original, tensors=tensors, config=config)
        word = {"F32": "f32", "F16": "f16", "BF16": "bf16", None: None}[self.dtype]
        encoded = Encoding(word, None, None, (), ()).apply(merged, self.writer)
        if self.options.requantize:
            encoded.tensors = {
                name: self._measured(tensor, tensors) for name, tensor in encoded.tensors.items()
            }
        return encoded

    def _measured(self, tensor: LazyTensor, merged: dict[str, LazyTensor]) -> LazyTensor:
        """Measure what quantizing a merged dense weight leaves of its delta."""
        from loraformat.ops.requantized import requantized

        edit, dense = self.plan.edits.get(tensor.name), merged[tensor.name]
        if edit is None or edit.source is None or not isinstance(dense, DenseTensor):
            return tensor
        if not isinstance(tensor, NF4Tensor):
            return tensor
        source = self.original.tensors[edit.source]
        return requantized(
            dense, source, tensor.block_size, tensor.double_quant, tensor.transposed, self.meter
        )

    def _edits(self) -> dict[str, Any]:
        """Add to the plan, if it shall be undone, what a cast changes."""
        from loraformat.ops.edits import Edit

        edits = dict(self.plan.edits)
        if self.recorders is not None and self.dtype is not None:
            for name, tensor in self.original.tensors.items():
                if tensor.dtype in ("F64", "F32", "F16", "BF16") and tensor.dtype != self.dtype:
                    edits.setdefault(name, Edit(name, name))
        return edits

    def _tensor(self, edit: Any, source: LazyTensor | None) -> LazyTensor:
        from loraformat.ops.merged import merged_tensor
        from loraformat.ops.requantized import requantized

        recorder = None
        if self.recorders is not None and self.spool is not None:
            from loraformat.ops.undo_recorder import UndoRecorder

            recorder = self.recorders[edit.name] = UndoRecorder(
                edit, source, self.dtype, self.spool
            )
        again = self.options.requantize and isinstance(source, NF4Tensor)
        merged = merged_tensor(
            edit,
            source,
            self.adapters,
            self.options.weights,
            source.dtype if again and source is not None else self.dtype,
            exact=self.recorders is not None,
            meter=None if self.options.requantize else self.meter,
            recorder=recorder,
            pool=self.pool,
        )
        if again and isinstance(source, NF4Tensor):
            return requantized(
                merged,
                source,
                source.block_size,
                source.double_quant,
                source.transposed,
                self.meter,
            )
        return merged

    def write(
        self,
        target: Path,
        undo: str | Path | None,
        force: bool,
        progress: Callable[[int, int], None],
    ) -> tuple[WrittenModel, UndoSummary | None]:
        """Write the output, and the record before it appears."""
        total = sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        inputs = [self.original.path, *self.original.sources]
        for adapter in self.adapters:
            inputs += [adapter.path, *adapter.sources]
        inputs = [path for path in inputs if path.exists()]
        assert self.writer.write is not None
        with open_publication(
            self.writer.output, target, plan=self._describe(), inputs=inputs, force=force
        ) as output:
            if undo is not None:
                output.resumed.clear()  # what is not computed now would be missing in the record
            try:
                written = self.writer.write(
                    self.checkpoint, output, WriteOptions(self.options.shard_limit, count)
                )
            except InputError as error:
                error.path = error.path or str(self.original.path)
                raise
            self.original.close()  # raises if an input changed, before anything is published
            summary = None
            if undo is not None:
                summary = self._write_undo(Path(undo), written)
            output.commit()
        return written, summary

    def _write_undo(self, path: Path, written: WrittenModel) -> UndoSummary:
        from loraformat.ops.undo_recorder import write_record

        assert self.recorders is not None
        return write_record(
            path, self.original, self.adapters, self.options.weights, self.recorders, written
        )

    def _describe(self) -> str:
        """Describe input and options, so that only the same merge continues a work directory."""
        sources = [*self.original.sources]
        for adapter in self.adapters:
            sources += adapter.sources
        states = [(path.name, path.stat()) for path in sources]
        inputs = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
        memory = [
            f"{adapter.path} {sorted(adapter.deltas)}" for adapter in self.adapters
            if not adapter.sources
        ]  # fmt: skip
        return json.dumps(
            [__version__, "merge", self.writer.name, asdict(self.options), inputs, memory]
        )


def _untied(config: bytes) -> bytes:
    """Return ``config.json`` with a head of its own."""
    fields = parse(config)
    inner = fields.get("text_config")
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        inner["tie_word_embeddings"] = False
    keys = list(fields)
    fields["tie_word_embeddings"] = False
    if keys == sorted(keys):
        fields = dict(sorted(fields.items()))
    return (json.dumps(fields, indent=2) + "\n").encode()


def _completed(
    report: MergeReport,
    job: _Job,
    written: WrittenModel,
    undo: UndoSummary | None,
    seconds: float,
) -> MergeReport:
    total = job.meter.total() if job.meter.sums else None
    dtypes = [job.checkpoint.tensors[name].dtype for name in job.meter.sums]
    notes = [*report.notes, *written.notes]
    missing = report.merged - len(job.meter.sums)
    if missing > 0:
        notes.append(f"{missing} tensors were merged by an earlier, interrupted run: not measured")
    return replace(
        report,
        modules=job.meter.changes(),
        total=total,
        output_bytes=written.nbytes,
        undo=undo,
        notes=notes,
        warnings=advice(total, dtypes, requantized=job.options.requantize) if total else [],
        seconds=seconds,
    )
