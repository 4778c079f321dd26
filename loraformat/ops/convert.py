"""Conversion: any base format into any other, tensor by tensor.

::

    source ── reader ──> Checkpoint ── encode (lazily) ──> Checkpoint
                                                               │
    output <── rename ── work directory <── writer ────────────┘
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from loraformat import plugins
from loraformat.checkpoint import Checkpoint, Provenance
from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.hub import Source, resolve
from loraformat.layout import DEFAULT_SHARD_LIMIT
from loraformat.ops.encoding import Encoding
from loraformat.ops.report import (
    ConversionReport,
    complete,
    losses,
    plan_report,
    shard_notes,
)
from loraformat.plugins import Converter, WriteOptions
from loraformat.publish_file import open_publication
from loraformat.version import __version__

__all__ = ["convert"]


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
    if reader.kind == "adapter":
        raise UsageError(
            f"{source} is an adapter ({reader.name}), and only bases can be converted",
            hint="merge, reduce, combine and spectrum take adapters",
        )
    writer = plugins.for_output(Path(target), to_format, reader.kind)
    if reader.read is None:
        raise UsageError(f"format {reader.name!r} can be written but not read")
    encoding = Encoding(dtype, block_size, double_quant, tuple(skip), tuple(include))
    with reader.read(found.path) as original:
        checkpoint = encoding.apply(_with_origin(original, found), writer)
        lost = list(losses(original, reader, writer))
        if strict and lost:
            raise UnsupportedError(
                f"{writer.name} cannot hold: {'; '.join(lost)}",
                path=found.path,
                hint="leave out --strict to go on without",
            )
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        report = plan_report(original, checkpoint, Path(target), reader, writer, lost)
        if dry_run:
            notes = [*report.notes, *shard_notes(checkpoint, shard_limit)]
            return replace(report, dry_run=True, notes=notes)
        options = WriteOptions(shard_limit, _Counter(total, progress).add)
        plan = _plan(checkpoint, encoding, writer, shard_limit)
        with open_publication(
            writer.output, Path(target), plan=plan, inputs=_inputs(original), force=force
        ) as output:
            assert writer.write is not None
            try:
                written = writer.write(checkpoint, output, options)
            except InputError as error:
                error.path = error.path or str(source)  # a tensor knows its name, not its file
                raise
            original.close()  # raises if an input changed, before anything is published
            output.commit()
    return complete(report, checkpoint, written, time.perf_counter() - began)


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


def _with_origin(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    if source.repo is None:
        return checkpoint
    origin = Provenance(checkpoint.provenance.format, source.repo, source.revision)
    return replace(checkpoint, provenance=origin)


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.path, *checkpoint.sources]


def _plan(checkpoint: Checkpoint, encoding: Encoding, writer: Converter, shard_limit: int) -> str:
    """Describe input and options, so that only the same conversion continues a work directory."""
    inputs = []
    for path in checkpoint.sources:
        status = path.stat()
        inputs.append([path.name, status.st_size, status.st_mtime_ns])
    return json.dumps([__version__, writer.name, asdict(encoding), shard_limit, inputs])
