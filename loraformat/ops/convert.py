"""Conversion: any base format into any other, tensor by tensor.

::

    source ── reader ──> Checkpoint ── encode (lazily) ──> Checkpoint
                                                               │
    output <── rename ── work directory <── writer ────────────┘
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loraformat import plugins
from loraformat.architecture import is_plain_in_peers, kind_of
from loraformat.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor, Provenance
from loraformat.config_json import parse, with_dtype
from loraformat.dtypes import TORCH_NAMES, parse_weight_dtype
from loraformat.errors import UnsupportedError, UsageError
from loraformat.hub import Source, resolve
from loraformat.layout import DEFAULT_SHARD_LIMIT, execution_units, plan_shards
from loraformat.model_directory import WrittenModel
from loraformat.ops.encode import QuantizationPolicy, cast, dequantized, matches, quantized
from loraformat.plugins import Converter, WriteOptions
from loraformat.publish import Publication
from loraformat.version import __version__

__all__ = ["ConversionReport", "convert"]


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did.

    Attributes
    ----------
    source, target : str
    source_format, target_format : str
    tensors, quantized : int
        Logical tensors, and how many of them are in NF4.
    parameters : int
        Elements of all tensors.
    input_bytes, output_bytes : int
        Sizes on disk; of a dry run the output's is an estimate.
    bits_per_weight : float
        Output bits per parameter, everything included.
    errors_by_kind : dict of str to float
        Relative RMS error of the weights quantized now, by kind of layer.
    notes : list of str
        What a user should know.
    lost : list of str
        What the source held and the target does not.
    seconds : float
    dry_run : bool
    """

    source: str
    target: str
    source_format: str
    target_format: str
    tensors: int
    quantized: int
    parameters: int
    input_bytes: int
    output_bytes: int
    bits_per_weight: float
    errors_by_kind: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return asdict(self)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    from_format: str | None = None,
    to_format: str | None = None,
    dtype: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    shard_limit: int = DEFAULT_SHARD_LIMIT,
    force: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """Convert a model.

    Parameters
    ----------
    source : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.
    target : str or Path
        The output directory; it must not exist, unless ``force``.
    from_format, to_format : str, optional
        Converter names. By default the source is recognised by its content, and a directory
        becomes a bundle.
    dtype : str, optional
        ``f32``, ``f16`` or ``bf16`` for dense tensors; by default each keeps its own.
        Rounded to nearest even.
    block_size : int, optional
        Elements per scale, 64 by default.
    double_quant : bool, optional
        Quantize the scales too; true by default.
    skip, include : sequence of str
        See `QuantizationPolicy`.
    shard_limit : int
        Bytes of tensor data per file.
    force : bool
        Replace a model at the target.
    strict : bool
        Refuse if the target cannot hold all that the source holds.
    dry_run : bool
        Write nothing, report what would be written.
    progress : callable
        Called with the bytes done and the bytes in total after each tensor.

    Returns
    -------
    ConversionReport

    Raises
    ------
    LoraFormatError
        Nothing appears at the target then.
    """
    began = time.perf_counter()
    found = resolve(source)
    reader = plugins.get(from_format) if from_format else plugins.sniff(found.path)
    writer = plugins.for_output(Path(target), to_format, reader.kind)
    if reader.read is None:
        raise UsageError(f"format {reader.name!r} can be written but not read")
    encoding = _Encoding(dtype, block_size, double_quant, tuple(skip), tuple(include))
    with reader.read(found.path) as original:
        checkpoint = encoding.apply(_with_origin(original, found), writer)
        lost = [*_losses(reader, writer, original)]
        if strict and lost:
            raise UnsupportedError(
                f"{writer.name} cannot hold: {'; '.join(lost)}",
                path=found.path,
                hint="leave out --strict to go on without",
            )
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        report = _report(original, checkpoint, Path(target), reader, writer, lost)
        if dry_run:
            return replace(report, dry_run=True, notes=_plan_notes(checkpoint, shard_limit))
        options = WriteOptions(shard_limit, _Counter(total, progress).add)
        plan = _plan(checkpoint, encoding, writer, shard_limit)
        with Publication(Path(target), plan=plan, inputs=_inputs(original), force=force) as output:
            assert writer.write is not None
            written = writer.write(checkpoint, output, options)
            original.close()  # raises if an input changed, before anything is published
            output.commit()
    return _complete(report, checkpoint, written, time.perf_counter() - began)


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """What the user wants of the weights."""

    dtype: str | None
    block_size: int | None
    double_quant: bool | None
    skip: tuple[str, ...]
    include: tuple[str, ...]

    def apply(self, checkpoint: Checkpoint, writer: Converter) -> Checkpoint:
        """Return the checkpoint as the writer takes it; nothing is computed yet."""
        dtype = parse_weight_dtype(self.dtype) if self.dtype else None
        if writer.stores == "nf4":
            tensors = self._to_nf4(checkpoint, dtype)
        else:
            self._refuse_quantization(writer)
            tensors = [self._to_dense(t, dtype, writer) for t in checkpoint.tensors.values()]
        config = checkpoint.config
        if config is not None and dtype is not None:
            config = with_dtype(config, TORCH_NAMES[dtype])
        keeps = any(isinstance(tensor, NF4Tensor) for tensor in checkpoint.tensors.values())
        return replace(
            checkpoint,
            tensors={tensor.name: tensor for tensor in tensors},
            config=config,
            quantization_config=checkpoint.quantization_config
            if keeps and not self.include
            else None,
        )

    def _refuse_quantization(self, writer: Converter) -> None:
        if self.block_size or self.double_quant is not None or self.skip or self.include:
            raise UsageError(
                f"{writer.name} stores dense weights; --block-size, --no-double-quant, --skip and "
                "--include speak of quantization"
            )

    def _to_dense(self, tensor: LazyTensor, dtype: str | None, writer: Converter) -> LazyTensor:
        if isinstance(tensor, NF4Tensor):
            return tensor if writer.stores == "both" else dequantized(tensor, dtype)
        return cast(tensor, dtype)

    def _to_nf4(self, checkpoint: Checkpoint, dtype: str | None) -> list[LazyTensor]:
        already = any(isinstance(tensor, NF4Tensor) for tensor in checkpoint.tensors.values())
        if already and (self.block_size or self.double_quant is not None or self.skip):
            raise UsageError(
                "the source is in NF4 already, and weights are never quantized twice; "
                "start from the original to change block size, double quantization or --skip"
            )
        policy = QuantizationPolicy(
            self.block_size or 64, self.double_quant is not False, self.skip, self.include
        )
        model_type = _model_type(checkpoint)
        tensors: list[LazyTensor] = []
        for tensor in checkpoint.tensors.values():
            tensor = cast(tensor, dtype)
            if isinstance(tensor, DenseTensor):
                # What a quantized source left plain was left so on purpose.
                wanted = matches(tensor.name, self.include) if already else True
                if wanted and policy.selects(tensor):
                    tensor = quantized(tensor, policy, model_type)
            tensors.append(tensor)
        return tensors


def _model_type(checkpoint: Checkpoint) -> str | None:
    named = parse(checkpoint.config).get("model_type") if checkpoint.config else None
    return named if isinstance(named, str) else None


def _with_origin(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    if source.repo is None:
        return checkpoint
    origin = Provenance(checkpoint.provenance.format, source.repo, source.revision)
    return replace(checkpoint, provenance=origin)


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.path, *checkpoint.sources]


def _losses(reader: Converter, writer: Converter, original: Checkpoint) -> Iterable[str]:
    yield from original.left_behind
    if reader.name != writer.name:
        # What the source's format cannot hold either was not there to be lost.
        yield from (loss for loss in writer.loses if loss not in reader.loses)


def _plan(checkpoint: Checkpoint, encoding: _Encoding, writer: Converter, shard_limit: int) -> str:
    """Describe input and options, so that only the same conversion continues a work directory."""
    inputs = []
    for path in checkpoint.sources:
        status = path.stat()
        inputs.append([path.name, status.st_size, status.st_mtime_ns])
    return json.dumps([__version__, writer.name, asdict(encoding), shard_limit, inputs])


def _report(
    original: Checkpoint, checkpoint: Checkpoint, target: Path,
    reader: Converter, writer: Converter, lost: list[str],
) -> ConversionReport:  # fmt: skip
    tensors = checkpoint.tensors.values()
    parameters = sum(tensor.count for tensor in tensors)
    output = sum(tensor.nbytes for tensor in tensors)
    return ConversionReport(
        source=str(original.path), target=str(target),
        source_format=reader.name, target_format=writer.name,
        tensors=len(checkpoint.tensors),
        quantized=sum(isinstance(tensor, NF4Tensor) for tensor in tensors),
        parameters=parameters,
        input_bytes=sum(path.stat().st_size for path in original.sources),
        output_bytes=output,
        bits_per_weight=8 * output / max(parameters, 1),
        notes=_notes(checkpoint),
        lost=lost,
    )  # fmt: skip


def _notes(checkpoint: Checkpoint) -> list[str]:
    quantized_now = [t for t in checkpoint.tensors.values() if isinstance(t, NF4Tensor)]
    plain = [t for t in checkpoint.tensors.values() if isinstance(t, DenseTensor)]
    experts = [tensor for tensor in plain if ".experts." in tensor.name]
    unusual = [tensor for tensor in quantized_now if is_plain_in_peers(tensor.name)]
    notes = []
    if quantized_now and experts:
        gigabytes = sum(tensor.nbytes for tensor in experts) / 1e9
        notes.append(
            f"{len(experts)} expert weights ({gigabytes:.2f} GB) stay plain: transformers fuses "
            "experts into parameters that bitsandbytes does not quantize"
        )
    if unusual:
        notes.append(
            f"{len(unusual)} embeddings, routers or experts are in NF4 ({unusual[0].name}, ...): "
            "transformers cannot open the result"
        )
    return notes


def _plan_notes(checkpoint: Checkpoint, shard_limit: int) -> list[str]:
    shards = plan_shards(execution_units(checkpoint.tensors.values()), shard_limit)
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    return _notes(checkpoint) + [
        f"shard {number} of {len(sizes)}: {size / 1e6:,.1f} MB"
        for number, size in enumerate(sizes, 1)
    ]


def _complete(
    report: ConversionReport, checkpoint: Checkpoint, written: WrittenModel, seconds: float
) -> ConversionReport:
    return replace(
        report,
        output_bytes=written.nbytes,
        bits_per_weight=8 * written.nbytes / max(report.parameters, 1),
        errors_by_kind=_errors_by_kind(checkpoint, written),
        notes=[*report.notes, *written.notes],
        seconds=seconds,
    )


def _errors_by_kind(checkpoint: Checkpoint, written: WrittenModel) -> dict[str, float]:
    """Root of the element-weighted mean square of the relative errors, by kind of layer."""
    sums: dict[str, tuple[float, int]] = {}
    for name, record in written.shards.tensors.items():
        if record.relative_rms_error is not None:
            square, count = sums.get(kind_of(name), (0.0, 0))
            weight = checkpoint.tensors[name].count
            sums[kind_of(name)] = (square + weight * record.relative_rms_error**2, count + weight)
    return {kind: (square / count) ** 0.5 for kind, (square, count) in sorted(sums.items())}
