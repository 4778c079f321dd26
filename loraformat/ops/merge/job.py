"""One merge: from the plan of what changes to the written model and its undo record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loraformat.errors import UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.tied_head import refuse_lost_head, untied_config
from loraformat.model.written import WrittenModel
from loraformat.ops.deltas.spool import Spool
from loraformat.ops.encoding.choice import Encoding
from loraformat.ops.encoding.one_dtype import Alignment, aligned
from loraformat.ops.encoding.requantization import (
    again_as,
    original_of,
    requantization_notes,
    with_history,
)
from loraformat.ops.merge.plan import TensorEdit, plan_edits
from loraformat.ops.merge.recorder import RecordPublication, UndoRecorder, write_record
from loraformat.ops.merge.report import Meter, UndoSummary
from loraformat.ops.merge.tensor import BufferPool, MergedTensor, requantized
from loraformat.ops.merge.tokenizers import resized_base, tokens_without_rows, with_conversation
from loraformat.ops.model_output import ModelOutput, input_paths
from loraformat.plugins import BaseFormat, Forecast, WriteOptions
from loraformat.tensors.dtypes import parse_weight_dtype

__all__ = ["MergeJob", "MergeOptions"]


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options that determine the output's bytes.

    Attributes
    ----------
    weights : tuple of float
        One per adapter.
    dtype : str or None
        ``f32``, ``f16`` or ``bf16``, or a type of the writer's own.
    requantize : bool
        NF4 weights stay NF4.
    shard_limit : int
        Bytes.
    pre_tokenizer : str or None
        What the output's format calls the model's pre-tokenizer.
    """

    weights: tuple[float, ...]
    dtype: str | None
    requantize: bool
    shard_limit: int
    pre_tokenizer: str | None = None


class MergeJob:
    """One merge of adapters that were opened against its base.

    In the spool the undo record's residuals wait; without one there is no record.

    Attributes
    ----------
    plan : MergePlan
    checkpoint : Checkpoint
        What will be written, lazily.
    meter : Meter
        What became of each delta, once it is written.
    alignment : Alignment
        What became of dense tensors of another type than most, once they are written.
    """

    def __init__(
        self,
        original: Checkpoint,
        adapters: Sequence[Adapter],
        options: MergeOptions,
        writer: BaseFormat,
        spool: Spool | None,
    ) -> None:
        self.original, self.adapters = original, adapters
        self.options, self.writer, self.spool = options, writer, spool
        self.quantized = bool(original.nf4_weights)
        self.pool, self.alignment = BufferPool(), Alignment()
        self.recorders: dict[str, UndoRecorder] = {}
        self.plan = plan_edits(original, adapters, options.weights)
        self.dtype = self._output_dtype()
        if spool is not None:
            self._check_undo()
        self.meter = Meter(self._told() if writer.dtypes else {})
        self.checkpoint = self._merged()

    def _told(self) -> dict[str, LazyTensor]:
        """Return the tensors with deltas before the merge, for the retention meter."""
        told: dict[str, LazyTensor] = {}
        for name, edit in self.plan.edits.items():
            if not edit.terms:
                continue
            source = self._source(edit)
            without = MergedTensor(
                replace(edit, terms=[]), source, self.adapters, self.options.weights, "F32"
            )
            # What an adapter replaces by values of its own is measured from these.
            told[name] = source if source and edit.only_deltas else without.dense()
        return told

    def _source(self, edit: TensorEdit) -> LazyTensor | None:
        return None if edit.source is None else self.original.tensors[edit.source]

    def _output_dtype(self) -> str | None:
        if self.writer.dtypes:
            return "F32"  # the writer rounds, and once is enough
        if self.options.dtype:
            return parse_weight_dtype(self.options.dtype)
        return "BF16" if self.quantized and self.writer.stores == "dense" else None

    def _check_undo(self) -> None:
        if self.writer.dtypes:
            raise UsageError(f"an undo record restores dense weights, not {self.writer.name}")
        if self.options.requantize or self.quantized:
            raise UsageError(
                "an undo record restores dense weights, and this merge is from or to NF4",
                hint="keep the bundle; merging does not change it",
            )

    def _merged(self) -> Checkpoint:
        tensors: dict[str, LazyTensor] = dict(self.original.tensors)
        for name, edit in self._edits().items():
            tensors[name] = self._tensor(edit, self._source(edit))
        original, resize = self.original, self.plan.resize
        if resize is not None:
            original, note = resized_base(original, resize, self.adapters, tensors)
            self.plan.notes.append(note)
        else:
            self.plan.notes.extend(tokens_without_rows(original, self.adapters))
        added = [a for a, w in zip(self.adapters, self.options.weights, strict=True) if w > 0]
        files, notes = with_conversation(original.files, added)
        self.plan.notes.extend(notes)
        config = original.config
        if self.plan.untied and config is not None:
            config = untied_config(config)
        # What is merged is not what the base's fingerprint says any more.
        told = with_history(
            self.original,
            codes_kept=self.writer.stores != "dense" and not self.options.requantize,
        )
        origin = replace(told.provenance, format="merge")
        merged = replace(original, tensors=tensors, config=config, files=files, provenance=origin)
        refuse_lost_head(merged)
        word = self.options.dtype if self.writer.dtypes else self.dtype and self.dtype.lower()
        encoded = Encoding(word, None, None, (), ()).apply(merged, self.writer)
        if not self.quantized:
            encoded, self.alignment = aligned(encoded)
        if self.options.requantize:
            encoded.tensors = {
                name: self._measured(tensor, tensors) for name, tensor in encoded.tensors.items()
            }
        return encoded

    def quantized_again(self, written: WrittenModel | None) -> list[str]:
        """Return the note on requantization; in a dry run without a figure."""
        again = again_as(self.original, self.checkpoint.tensors, self.writer, self.options.dtype)
        steps = with_history(self.original, codes_kept=False).provenance.quantized
        records = None if written is None else written.shards.tensors
        return requantization_notes(steps, again, records, original_of(self.original))

    def _measured(self, tensor: LazyTensor, merged: dict[str, LazyTensor]) -> LazyTensor:
        """Measure how much of a delta requantization keeps."""
        edit, dense = self.plan.edits.get(tensor.name), merged[tensor.name]
        if edit is None or edit.source is None or edit.height is not None:
            return tensor
        if not isinstance(dense, DenseTensor) or not isinstance(tensor, NF4Tensor):
            return tensor
        source = self.original.tensors[edit.source]
        return requantized(dense, source, tensor, self.meter)

    def _edits(self) -> dict[str, TensorEdit]:
        """Add casts to the plan if the merge is to be undone."""
        edits = dict(self.plan.edits)
        if self.spool is not None and self.dtype is not None:
            for name, tensor in self.original.tensors.items():
                if tensor.dtype in ("F64", "F32", "F16", "BF16") and tensor.dtype != self.dtype:
                    edits.setdefault(name, TensorEdit(name, name))
        return edits

    def _tensor(self, edit: TensorEdit, source: LazyTensor | None) -> LazyTensor:
        recorder = None
        if self.spool is not None:
            recorder = UndoRecorder(edit, source, self.dtype, self.spool)
            self.recorders[edit.name] = recorder
        again = self.options.requantize and isinstance(source, NF4Tensor) and not edit.height
        later = self.options.requantize or self.meter.before(edit.name) is not None
        merged = MergedTensor(
            edit,
            source,
            self.adapters,
            self.options.weights,
            source.dtype if again and source is not None else self.dtype,
            meter=None if later else self.meter,
            recorder=recorder,
            pool=self.pool,
        ).dense()
        if again and isinstance(source, NF4Tensor):
            return requantized(merged, source, source, self.meter)
        return merged

    def write(
        self,
        target: Path,
        undo: str | Path | None,
        force: bool,
        progress: Callable[[int, int], None],
    ) -> tuple[WrittenModel, UndoSummary | None]:
        """Write the output and its undo record, if requested, as one transaction."""
        output = ModelOutput(
            target,
            self.writer,
            inputs=[self.original, *self.adapters],
            plan=["merge", asdict(self.options), self._deltas_in_memory()],
            force=force,
            progress=progress,
        )
        with output:
            record = None if undo is None else self._record(Path(undo), output, force)
            written = output.write(self.checkpoint, self._write_options())
            if record is None:
                return written, None
            weights = self.options.weights
            return written, write_record(
                record, self.original, self.adapters, weights, self.recorders, written
            )

    def _record(self, path: Path, output: ModelOutput, force: bool) -> RecordPublication:
        inputs = input_paths([self.original, *self.adapters])
        record = RecordPublication(path, output.publication, inputs, force=force)
        output.publish_with(record)
        # What is not computed now would be missing in the record.
        output.publication.resumed.clear()
        return record

    def _write_options(self) -> WriteOptions:
        rounds = bool(self.writer.dtypes)
        return WriteOptions(
            self.options.shard_limit,
            dtype=self.options.dtype if rounds else None,
            pre_tokenizer=self.options.pre_tokenizer,
            watch=self.meter if rounds else None,
        )

    def estimate(self, target: Path) -> Forecast | None:
        """Return the writer's forecast; None if it has none."""
        return self.writer.estimate(self.checkpoint, target, self._write_options())

    def _deltas_in_memory(self) -> list[str]:
        """Describe in-memory adapters, so that only the same merge resumes an output."""
        return [
            f"{adapter.path} {sorted(adapter.deltas)}" for adapter in self.adapters
            if not adapter.sources
        ]  # fmt: skip
