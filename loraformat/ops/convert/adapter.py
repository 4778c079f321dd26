"""Conversion of adapters: into a bundle, out of one, and from any adapter format to any.

::

    source ── reader ──> Adapter ── copy, or write anew ──> work directory ── rename ──> output

Inside a bundle the output is ``BUNDLE/adapters/NAME``, and the bundle's manifest lists it;
see `loraformat.bundle.update`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraformat import plugins
from loraformat.bundle.integrity import check_listed
from loraformat.bundle.update import BundleSlot, parse_bundle_slot, read_manifest
from loraformat.errors import UnsupportedError, UsageError
from loraformat.hub import Source, resolve
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import DenseTensor
from loraformat.ops.adapter_output.base import open_base
from loraformat.ops.adapter_output.form import AdapterOutput, BaseIdentity, check_fits, plan_output
from loraformat.ops.adapter_output.in_bundle import check_incoming, put
from loraformat.ops.adapter_output.one_rank import with_one_rank
from loraformat.ops.adapter_output.target import publish_adapter
from loraformat.ops.convert.report import ConversionReport
from loraformat.ops.opening.adapter import open_adapter
from loraformat.plugins import Converter
from loraformat.shards.records import FileRecord
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["AdapterConversion", "convert_adapter", "tensors_of"]


#: What a report has of models alone.
_OF_MODELS = ("quantized", "errors_by_kind")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AdapterConversion(ConversionReport):
    """What the conversion of an adapter did.

    Attributes
    ----------
    verbatim : bool
        Its files were copied byte for byte; else it was written anew in canonical form.
    modules : int
        Weights that it changes or replaces.
    ranks : list of int
        Every rank that occurs.
    base_model, base_fingerprint : str or None
        What it says of its base now.
    kind : str
        ``"adapter"``, always.
    """

    verbatim: bool
    modules: int
    ranks: list[int]
    base_model: str | None
    base_fingerprint: str | None
    kind: str = "adapter"

    def to_dict(self) -> dict[str, Any]:
        """Return the members that ``--json`` prints."""
        members = ConversionReport.to_dict(self)
        return {name: members[name] for name in members if name not in _OF_MODELS}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """What a user may ask of a conversion; see `loraformat.ops.convert.convert`.

    With ``one_rank`` all modules get one rank (see `loraformat.ops.adapter_output.one_rank`), and
    the base is called by its Hub id where that is known.
    """

    to_format: str | None = None
    dtype: str | None = None
    base: str | Path | None = None
    canonical: bool = False
    allow_pickle: bool = False
    allow_base_mismatch: bool = False
    force: bool = False
    strict: bool = False
    dry_run: bool = False
    one_rank: bool = False


def convert_adapter(
    source: Source, reader: Converter, target: Path, options: AdapterOptions
) -> AdapterConversion:
    """Convert an adapter.

    Parameters
    ----------
    source : Source
    reader : Converter
        Of adapters.
    target : Path
        ``BUNDLE/adapters/NAME``, or an output of its own.
    options : AdapterOptions

    Raises
    ------
    LoraFormatError
        Nothing appears at the target then, and a bundle is as it was.
    """
    began = time.perf_counter()
    place, origin = parse_bundle_slot(target), parse_bundle_slot(source.path)
    writer = _writer(target, place, options)
    lost = [loss for loss in writer.loses if writer.name != reader.name]
    lost = [loss for loss in lost if loss not in reader.loses]
    if options.strict and lost:
        raise UnsupportedError(
            f"{writer.name} cannot hold: {'; '.join(lost)}",
            path=source.path,
            hint="leave out --strict to go on without",
        )
    with ExitStack() as stack:
        anew = options.canonical or options.dtype is not None or writer.name != reader.name
        base, home = open_base(stack, options.base, place, origin if anew else None)
        adapter = stack.enter_context(
            open_adapter(
                source,
                reader=reader,
                base=base,
                allow_pickle=options.allow_pickle,
                conditional=place is None,
            )
        )
        if options.one_rank:
            named = _repository(options.base, home) or adapter.base_model
            adapter = replace(with_one_rank(adapter, base), base_model=named)
        listed, notes = _listed(origin)
        if listed is not None:
            check_listed(SafeDirectory(source.path), listed)
            adapter = replace(adapter, files=tuple(f for f in adapter.files if f.path in listed))
        output = plan_output(
            adapter,
            writer,
            canonical=options.canonical,
            dtype=options.dtype,
            base=base,
            home=home,
            allow_base_mismatch=options.allow_base_mismatch,
            expected=listed,
        )
        if place is not None and base is not None:
            notes += check_incoming(adapter, base)
        elif base is not None and base.tensors:
            notes += check_fits(adapter, base)
        report = _report(source, target, output, lost, notes)
        if options.dry_run:
            return _foreseen(report, output, target)
        if place is not None and home is not None:
            records = put(
                output, place, home.fingerprint, force=options.force, finish=adapter.close
            )
            nbytes = sum(record.bytes for record in records.values())
            said: list[str] = []
        else:
            nbytes, said = publish_adapter(
                output, target, force=options.force, finish=output.adapter.close
            )
    seconds = time.perf_counter() - began
    return replace(report, output_bytes=nbytes, seconds=seconds, notes=[*report.notes, *said])


def _writer(target: Path, place: BundleSlot | None, options: AdapterOptions) -> Converter:
    if place is None:
        return plugins.for_output(target, options.to_format, "adapter")
    if options.to_format not in (None, "peft"):
        raise UsageError(
            f"--to {options.to_format}: a bundle holds PEFT adapters",
            hint="leave it out, or choose an output outside the bundle",
        )
    if options.base is not None:
        raise UsageError("--base: the bundle is the base", hint="leave it out")
    return plugins.get("peft")


def _repository(base: str | Path | None, home: BaseIdentity | None) -> str | None:
    """Return the Hub id of a base, which means the same everywhere; None if it has none."""
    if home is not None and "repo" in home.source:
        return home.source["repo"]
    return resolve(base).repo if base is not None else None


def _listed(origin: BundleSlot | None) -> tuple[dict[str, FileRecord] | None, list[str]]:
    """Return the files that a manifest lists for the source, if that lies in a bundle."""
    if origin is None:
        return None, []
    listed = read_manifest(origin.bundle).adapters.get(origin.name)
    if listed is None:
        return None, ["its bundle does not list it: nothing was compared with a hash"]
    return listed, []


def tensors_of(adapter: Adapter) -> Iterator[DenseTensor]:
    """Yield every tensor of an adapter."""
    for delta in adapter.deltas.values():
        parts = (delta.a, delta.b, delta.magnitude, delta.bias)
        yield from (part for part in parts if part is not None)
    yield from adapter.replacements.values()
    yield from (rows.rows for rows in adapter.rows.values())


def _foreseen(report: AdapterConversion, output: AdapterOutput, target: Path) -> AdapterConversion:
    """Return the report of a dry run; what the writer would refuse is refused."""
    if output.verbatim or output.writer.forecast_adapter is None:
        return replace(report, dry_run=True)
    estimate = output.writer.forecast_adapter(output.adapter, target, output.options)
    notes = [*report.notes, *estimate.notes]
    return replace(report, dry_run=True, output_bytes=estimate.nbytes, notes=notes)


def _report(
    source: Source, target: Path, output: AdapterOutput, lost: list[str], notes: list[str]
) -> AdapterConversion:
    adapter = output.adapter
    parameters = sum(tensor.count for tensor in tensors_of(adapter))
    if output.verbatim:
        estimate = sum(file.nbytes for file in adapter.files)
    else:
        dtype = output.options.dtype
        estimate = sum(t.count * ITEM_BYTES.get(dtype or t.dtype, 2) for t in tensors_of(adapter))
    return AdapterConversion(
        source=source.repo or str(source.path),
        target=str(target),
        source_format=adapter.format,
        target_format=output.writer.name,
        verbatim=output.verbatim,
        modules=len(adapter.deltas.keys() | adapter.replacements.keys() | adapter.rows.keys()),
        parameters=parameters,
        ranks=sorted({delta.rank for delta in adapter.deltas.values()}),
        input_bytes=sum(path.stat().st_size for path in adapter.sources),
        output_bytes=estimate,
        base_model=adapter.base_model,
        base_fingerprint=adapter.base_fingerprint,
        notes=[*adapter.notes, *notes, *output.notes],
        lost=lost,
    )
