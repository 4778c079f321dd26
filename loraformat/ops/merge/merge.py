"""Merging: adapters into a base, tensor by tensor, into a new model.

::

    base ───── reader ──> Checkpoint ─┐
    adapters ─ open_adapter ─> edits ─┴─> Checkpoint of merged tensors ── writer ──> output
                                              └── undo record (if asked for)

The base is never changed. A weight gets all its deltas at once and is rounded once. The
output of a quantized base is dense, or a bundle that keeps the codes and has the adapter
beside them; quantizing again leaves next to nothing of an ordinary delta and must be asked
for by name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from loraformat import plugins
from loraformat.errors import UsageError
from loraformat.hub import resolve
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.written import WrittenModel
from loraformat.ops.arguments import Progress, byte_count, many, reported
from loraformat.ops.convert.report import losses
from loraformat.ops.deltas.spool import Spool
from loraformat.ops.encoding.llama_quantize import refuse_llama_type
from loraformat.ops.encoding.one_dtype import with_decoded_dtype
from loraformat.ops.encoding.requantization import history
from loraformat.ops.merge.job import MergeJob, MergeOptions
from loraformat.ops.merge.plan import MergePlan
from loraformat.ops.merge.recorder import refuse_record_path
from loraformat.ops.merge.report import (
    MergedAdapter,
    MergeReport,
    UndoSummary,
    advice,
    commands,
)
from loraformat.ops.merge.separate_delta import SeparateDelta, name_of
from loraformat.ops.model_output import input_paths
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.adapter_weights import adapter_weights
from loraformat.ops.opening.model import (
    check_base,
    compare_base,
    open_model,
    without_generated_card,
)
from loraformat.plugins import BaseFormat

__all__ = ["merge"]


def merge(
    base: str | Path,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    to: str | None = None,
    weight: float | Sequence[float] = (),
    from_: str | None = None,
    dtype: str | None = None,
    undo: str | Path | None = None,
    requantize: bool = False,
    name: str | None = None,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    config: str | Path | None = None,
    pre: str | None = None,
    max_shard_size: int | str = "2GB",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> MergeReport:
    """Merge adapters into a base and write a new model.

    `base` is never modified. The sum of all deltas is added to each weight and rounded once. A
    quantized `base` is written as dense weights, because requantizing would lose most of the delta.
    With ``to="loraformat"`` the NF4 codes are kept and the combined adapter is stored separately in
    the bundle.

    Parameters
    ----------
    base : str or Path
        A local path, or ``org/name[@revision]`` on the Hub, in any format.
    adapters : str, Path, Adapter or a sequence of them
        In any format. An open `Adapter` stays open.
    output : str or Path
        Output directory.
    to : str, optional
        Format of `output`. [default: safetensors]
    weight : float or sequence of float
        Weight of each adapter, in the same order. [default: 1]
    from_ : str, optional
        Format of `base`. [default: detected]
    dtype : str, optional
        Dtype of the output. [default: unchanged; NF4 becomes bf16, GGUF block types f32; f16 for a
        GGUF output] The q types are only for GGUF outputs.
    undo : str or Path, optional
        Write an undo record, from which `unmerge` restores `base` exactly.
    requantize : bool
        Quantize the merged weights to NF4. For a base that was already NF4 this loses nearly all of
        the delta.
    name : str, optional
        With ``to="loraformat"``: name of the adapter in the bundle. [default: its directory's name]
    allow_base_mismatch : bool
        Accept an adapter that was made for another base.
    allow_pickle, config, pre
        As in `convert`.
    max_shard_size : int or str
        Maximum tensor bytes per file.
    force : bool
        Replace an existing model at `output`.
    dry_run, progress
        As in `convert`.

    Returns
    -------
    MergeReport

    Raises
    ------
    LoraFormatError
        Nothing appears at the output then.

    Notes
    -----
    W' = W + Σ ωᵢ sᵢ Bᵢ Aᵢ (Hu 2021, section 4.1); with DoRA (Liu 2024, equation 5)
    W' = m · (W + s B A) / ‖W + s B A‖ by output feature. Of several adapters with DoRA among them
    each changes what those before it made, with the norms of the original, as in PEFT 0.21.
    """
    began = time.perf_counter()
    adapters = many(adapters)
    factors = adapter_weights(many(weight), len(adapters))
    limit = byte_count(max_shard_size, "max-shard-size")
    refuse_llama_type(dtype, Path(output), _command(base, adapters, factors))
    found = resolve(base, pickles=allow_pickle)
    reader = plugins.get(from_) if from_ else plugins.sniff(found.path, BaseFormat)
    writer = plugins.for_output(Path(output), to, BaseFormat, "safetensors")
    writer.check_pre_tokenizer(pre)
    beside = _is_beside(writer, requantize)
    _refuse_options(name, dtype, undo, beside)
    options = MergeOptions(factors, dtype, requantize, limit, pre)
    with ExitStack() as stack:
        told = stack.enter_context(reported(progress, "merge"))
        # Numbers in a format's own types are rounded once, after the sum, or not at all.
        read_as = "F32" if undo is None and (writer.dtypes or dtype) else None
        exact = writer.stores == "dense"
        opened_base = stack.enter_context(
            open_model(
                found,
                reader=reader,
                dtype=read_as,
                exact=exact,
                config=config,
                allow_pickle=allow_pickle,
            )
        )
        original = without_generated_card(opened_base)
        original, decoded = with_decoded_dtype(original, writer, dtype)
        opened = [
            stack.enter_context(open_adapter(given, base=original, allow_pickle=allow_pickle))
            for given in adapters
        ]
        notes = [*_compared_bases(original, opened, allow_base_mismatch), *decoded]
        report = MergeReport(
            source=str(base),
            target=str(output),
            source_format=reader.name,
            target_format=writer.name,
            adapters=[
                MergedAdapter(str(adapter.path), adapter.format, factor, adapter.notes)
                for adapter, factor in zip(opened, options.weights, strict=True)
            ],
            notes=notes,
            quantized_before=list(history(original)),
            lost=losses(reader, writer, found.path, original.left_behind),
            dry_run=dry_run,
        )
        if beside:
            separate = SeparateDelta(original, opened, factors, name_of(adapters, name))
            # Of an only adapter the writer says what is known of its base.
            said = [*(notes if len(opened) > 1 else []), *separate.notes]
            report = replace(report, beside=separate.name, notes=said)
            report = _planned(report, separate.checkpoint, separate.plan)
            if dry_run:
                return report
            result = separate.write(Path(output), limit, allow_base_mismatch, force, told)
            return replace(
                report,
                output_bytes=result.nbytes,
                notes=[*report.notes, *result.notes],
                seconds=time.perf_counter() - began,
            )
        spool = None
        if undo is not None:
            read = input_paths([original, *opened])
            refuse_record_path(Path(undo), Path(output), read, force=force)
            spool = stack.enter_context(closing(Spool(Path(undo).absolute().parent)))
        job = MergeJob(original, opened, options, writer, spool)
        report = _planned(report, job.checkpoint, job.plan)
        if dry_run:
            report = replace(report, notes=[*report.notes, *job.quantized_again(None)])
            estimate = job.estimate(Path(output))
            if estimate is None:
                return report
            notes = [*report.notes, *estimate.notes]
            return replace(report, output_bytes=estimate.nbytes, notes=notes)
        written, summary = job.write(Path(output), undo, force, told)
    return _completed(report, job, written, summary, time.perf_counter() - began)


def _compared_bases(base: Checkpoint, adapters: Sequence[Adapter], allowed: bool) -> list[str]:
    """Compare the base with what each adapter says of its own; say what a user should know."""
    own = "merge into its own base"
    return [
        note + _advice(adapter, base)
        for adapter in adapters
        for note in check_base(adapter, base, allowed=allowed, instead=own)
    ]


def _advice(adapter: Adapter, base: Checkpoint) -> str:
    """Say what a base of other values than those of the training means."""
    if compare_base(adapter, base).relation != "unknown":
        return ""
    if adapter.base_fingerprint is not None:
        return "; if it was trained on NF4, prefer merging into the bundle it was trained on"
    if base.provenance.format in ("loraformat", "bitsandbytes") or not adapter.base_source:
        return ""
    return "; it was trained on a bundle, whose NF4 values differ from these"


def _command(
    base: str | Path, adapters: Sequence[str | Path | Adapter], weights: Sequence[float]
) -> list[str]:
    """Return the command line of this merge, its output left out."""
    paths = [str(a.path if isinstance(a, Adapter) else a) for a in adapters]
    factors = [] if set(weights) == {1.0} else [f"--weight={weight:g}" for weight in weights]
    return ["loraformat", "merge", str(base), *paths, *factors, "-o"]


def _planned(report: MergeReport, output: Checkpoint, plan: MergePlan) -> MergeReport:
    return replace(
        report,
        merged=sum(bool(edit.terms) for edit in plan.edits.values()),
        replaced=sum(not edit.only_deltas for edit in plan.edits.values()),
        tensors=len(output.tensors),
        output_bytes=sum(tensor.nbytes for tensor in output.tensors.values()),
        notes=report.notes + ([] if report.beside else plan.notes),
    )


def _is_beside(writer: BaseFormat, requantize: bool) -> bool:
    """Tell whether the output is a bundle that keeps the base's codes."""
    if writer.stores == "dense" and requantize:
        raise UsageError(
            f"{writer.name} stores dense weights; --requantize applies only to NF4 outputs"
        )
    if writer.stores == "nf4" and not requantize and writer.name != "loraformat":
        raise UsageError(
            f"{writer.name} stores NF4, which loses nearly all of a typical delta on NF4 values",
            hint="merge --to loraformat keeps the codes and stores the adapter separately; or "
            "override with --requantize",
        )
    return writer.stores == "nf4" and not requantize


def _refuse_options(name: str | None, dtype: str | None, undo: object, beside: bool) -> None:
    if name is not None and not beside:
        raise UsageError("--name is for an adapter inside a bundle: add --to loraformat")
    if beside and (dtype is not None or undo is not None):
        raise UsageError(
            "--dtype and --undo apply only to dense outputs; this one keeps the base unchanged",
            hint="omit them",
        )


def _completed(
    report: MergeReport,
    job: MergeJob,
    written: WrittenModel,
    undo: UndoSummary | None,
    seconds: float,
) -> MergeReport:
    total = job.meter.total() if job.meter.sums else None
    dtypes = [job.checkpoint.tensors[name].dtype for name in job.meter.sums]
    if job.writer.dtypes:
        dtypes = [(job.options.dtype or "f16").upper()]
    notes = [*report.notes, *job.quantized_again(written), *written.notes, *job.alignment.notes()]
    missing = report.merged - len(job.meter.sums)
    if missing > 0:
        why = "merged by an earlier, interrupted run"
        if job.writer.dtypes:
            why = f"merged, and {job.writer.name} does not store them, or does not tell"
        notes.append(f"{missing} tensors were {why}: not measured")
    return replace(
        report,
        modules=job.meter.changes(),
        total=total,
        output_bytes=written.nbytes,
        undo=undo,
        notes=notes,
        warnings=[]
        if total is None
        else advice(
            total,
            dtypes,
            requantized=job.options.requantize,
            beside=commands(report) if report.quantized_before else (),
        ),
        seconds=seconds,
    )
