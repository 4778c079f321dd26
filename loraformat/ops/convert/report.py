"""The reports of ``convert``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from loraformat.errors import UnsupportedError
from loraformat.families.plain_linears import names_part
from loraformat.families.table import family_of
from loraformat.model.architecture import is_matrix_weight, is_plain_in_peers, kind_of, module_of
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.config_json import parse
from loraformat.model.quantization_history import Quantized
from loraformat.model.report import Report
from loraformat.model.written import WrittenModel
from loraformat.ops.encoding.requantization import history, original_of, requantization_notes, rms
from loraformat.plugins import BaseFormat, Forecast, Format, WriteOptions
from loraformat.shards.layout import execution_units, plan_shards

__all__ = [
    "ConversionReport",
    "ModelConversion",
    "complete",
    "losses",
    "plan_report",
    "with_estimate",
]


_Report = TypeVar("_Report", bound="ConversionReport")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ConversionReport(Report):
    """Report of a conversion.

    Attributes
    ----------
    source, target : str
    source_format, target_format : str
    parameters : int
        Elements of all tensors.
    input_bytes, output_bytes : int
        Sizes on disk; of a dry run the output's is an estimate.
    quantized : int
        Tensors of the output in NF4; of an adapter none.
    errors_by_kind : dict of str to float
        Relative RMS error of the weights quantized now, by kind of layer.
    """

    _shared: ClassVar[tuple[str, ...]] = ("notes", "lost", "seconds", "dry_run")

    source: str
    target: str
    source_format: str
    target_format: str
    parameters: int
    input_bytes: int
    output_bytes: int
    quantized: int = 0
    errors_by_kind: dict[str, float] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Output bits per parameter, everything included."""
        return 8 * self.output_bytes / max(self.parameters, 1)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ModelConversion(ConversionReport):
    """Report of a model conversion.

    Attributes
    ----------
    tensors : int
        Logical tensors.
    original : str or None
        The Hub id of the weights that a bundle was quantized from.
    quantized_before : list of Quantized
        How the source's weights were quantized, as far as it is known: the errors are against
        those numbers then, not against the original's.
    """

    tensors: int
    quantized_before: list[Quantized] = field(default_factory=list)
    original: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the members that ``--json`` prints."""
        return {**ConversionReport.to_dict(self), "bits_per_weight": self.bits_per_weight}


def plan_report(
    original: Checkpoint,
    checkpoint: Checkpoint,
    target: Path,
    reader: Format,
    writer: BaseFormat,
    lost: list[str],
) -> ModelConversion:
    """Return the report before the conversion of a model as it was read to one as it is written."""
    tensors = checkpoint.tensors.values()
    parameters = sum(tensor.count for tensor in tensors)
    output = sum(tensor.nbytes for tensor in tensors)
    return ModelConversion(
        source=str(original.path),
        target=str(target),
        source_format=reader.name,
        target_format=writer.name,
        tensors=len(checkpoint.tensors),
        quantized=len(checkpoint.nf4_weights),
        parameters=parameters,
        input_bytes=sum(path.stat().st_size for path in original.sources),
        output_bytes=output,
        quantized_before=list(history(original)),
        original=original_of(original),
        notes=_notes(checkpoint, writer),
        lost=lost,
    )


def _notes(checkpoint: Checkpoint, writer: BaseFormat) -> list[str]:
    to_nf4 = writer.stores == "nf4"
    quantized_now, plain = checkpoint.nf4_weights, checkpoint.dense_tensors
    of_experts = [t for t in plain if ".experts." in t.name]
    codes = [t for t in of_experts if t.dtype == "U8"]  # of a layout that is not bitsandbytes' own
    experts = [] if codes else [t for t in of_experts if is_matrix_weight(t.name, t.shape[-2:])]
    stacks = [tensor for tensor in quantized_now if tensor.segments is not None]
    linears = [tensor for tensor in quantized_now if tensor.segments is None]
    family = family_of(parse(checkpoint.config) if checkpoint.config else {})
    in_layout: list[LazyTensor] = [one for one in linears if ".experts." in one.name]
    in_layout += codes
    plain_in_peers = [tensor for tensor in linears if is_plain_in_peers(tensor.name, family.plain)]
    unusual = [tensor for tensor in plain_in_peers if tensor not in in_layout]
    foreign = [t for t in quantized_now if names_part(module_of(t.name), family.foreign)]
    notes = []
    if to_nf4 and not quantized_now:
        notes.append(
            "nothing was quantized: no tensor is the weight of a linear inside a decoder layer, by "
            "its name and shape; --include GLOB names others"
        )
    if to_nf4 and experts:
        gigabytes = sum(tensor.nbytes for tensor in experts) / 1e9
        why = (
            "skipped, left so by a quantized source, or of a class that transformers does not know"
            if writer.segments
            else "transformers fuses experts into parameters that bitsandbytes does not quantize"
        )
        notes.append(f"{len(experts)} expert weights ({gigabytes:.2f} GB) are not quantized: {why}")
    if to_nf4 and stacks:
        notes.append(
            f"{len(stacks)} stacks of experts are in NF4 (format 1.1): transformers opens the "
            "bundle after import loraformat.transformers"
        )
    if in_layout:
        notes.append(
            f"{len(in_layout)} experts' weights are in NF4 ({in_layout[0].name}, ...): "
            "transformers cannot open this layout without a program that adds it"
        )
    if misaligned := [t for t in linears if t.stored_shape[-1] % t.block_size]:
        notes.append(
            f"{len(misaligned)} weights have rows that are not a whole number of blocks "
            f"({misaligned[0].name}, ...): bitsandbytes up to 0.50.2 decodes them wrongly on CPUs "
            "with AVX-512"
        )
    if unusual:
        notes.append(
            f"{len(unusual)} embeddings or routers are in NF4 ({unusual[0].name}, ...): "
            "transformers cannot open the result"
        )
    if to_nf4 and foreign:
        name = kind_of(foreign[0].name)
        notes.append(
            f"{len(foreign)} weights are in NF4 for which transformers' class has no 4-bit form "
            f"({foreign[0].name}, ...): transformers cannot open the result, loraformat trains and "
            f"runs it; for transformers leave them dense (--skip '*.{name}' ...), or convert the "
            "bundle with --to safetensors"
        )
    return notes


def _shard_notes(checkpoint: Checkpoint, shard_limit: int) -> list[str]:
    """Return notes with the planned size of each shard."""
    shards = plan_shards(execution_units(checkpoint.tensors.values()), shard_limit)
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    return [
        f"shard {number} of {len(sizes)}: {size / 1e6:,.1f} MB"
        for number, size in enumerate(sizes, 1)
    ]


def with_estimate(report: _Report, estimate: Forecast | None) -> _Report:
    """Return the report of a dry run, with the writer's own forecast if there is one."""
    if estimate is None:
        return replace(report, dry_run=True)
    notes = [*report.notes, *estimate.notes]
    return replace(report, dry_run=True, output_bytes=estimate.nbytes, notes=notes)


def foreseen(
    report: ModelConversion,
    checkpoint: Checkpoint,
    writer: BaseFormat,
    target: Path,
    options: WriteOptions,
    again: Mapping[str, str],
) -> ModelConversion:
    """Return the report of a dry run: the writer's own forecast, or the sizes of the shards.

    What is ``again`` quantized is told as `complete` tells it, without a figure. What the writer
    would refuse is raised.
    """
    said = requantization_notes(report.quantized_before, again, original=report.original)
    estimate = writer.estimate(checkpoint, target, options)
    notes = [*report.notes, *said]
    if estimate is None and writer.output == "directory":
        notes += _shard_notes(checkpoint, options.shard_limit)
    return with_estimate(replace(report, notes=notes), estimate)


def complete(
    report: ModelConversion,
    checkpoint: Checkpoint,
    written: WrittenModel,
    again: Mapping[str, str],
    seconds: float,
) -> ModelConversion:
    """Return the report of a finished conversion.

    ``again`` are the weights that were quantized a second time, and their new types.
    """
    records = written.shards.tensors
    said = requantization_notes(report.quantized_before, again, records, report.original)
    return replace(
        report,
        output_bytes=written.nbytes,
        errors_by_kind=_errors_by_kind(checkpoint, written),
        notes=[*report.notes, *said, *written.notes],
        seconds=seconds,
    )


def _errors_by_kind(checkpoint: Checkpoint, written: WrittenModel) -> dict[str, float]:
    kinds: dict[str, list[tuple[float, int]]] = {}
    for name, record in written.shards.tensors.items():
        if record.relative_rms_error is not None:
            error = record.relative_rms_error, checkpoint.tensors[name].count
            kinds.setdefault(kind_of(name), []).append(error)
    return {kind: rms(errors) for kind, errors in sorted(kinds.items())}


def losses(
    reader: Format,
    writer: Format,
    path: Path,
    left_behind: Iterable[str] = (),
    *,
    strict: bool = False,
) -> list[str]:
    """Return what the source holds and the target cannot store.

    Raises
    ------
    UnsupportedError
        If it is ``strict``, and there is something.
    """
    lost = list(left_behind)
    if reader.name != writer.name:
        # What the source's format cannot hold either was not there to be lost.
        lost += [loss for loss in writer.loses if loss not in reader.loses]
    if strict and lost:
        raise UnsupportedError(
            f"{writer.name} cannot hold: {'; '.join(lost)}",
            path=path,
            hint="omit --strict to convert without it",
        )
    return lost
