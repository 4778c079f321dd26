"""Conversion of adapters between formats, into bundles and out of them.

::

    source ── reader ──> Adapter ── copy, or write anew ──> work directory ── rename ──> output

Inside a bundle the output is ``BUNDLE/adapters/NAME``, and the bundle's manifest lists it;
see `loraformat.bundle.update`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraformat.bundle.integrity import check_listed
from loraformat.hub import Source, resolve
from loraformat.model.expert_layouts import ExpertLayout, rearranged
from loraformat.ops.adapter_output.base import AdapterBase
from loraformat.ops.adapter_output.form import PlannedAdapter, tensors_of
from loraformat.ops.adapter_output.one_rank import with_one_rank
from loraformat.ops.adapter_output.output import open_adapter_output
from loraformat.ops.convert.report import ConversionReport, losses, with_estimate
from loraformat.ops.opening.adapter import listing, open_adapter
from loraformat.plugins import AdapterFormat
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["AdapterConversion", "convert_adapter"]


#: What a report has of models alone.
_OF_MODELS = ("quantized", "errors_by_kind")
_UNLISTED = "its bundle's manifest does not list it; no hash was verified"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AdapterConversion(ConversionReport):
    """Report of an adapter conversion.

    Attributes
    ----------
    verbatim : bool
        Its files were copied byte for byte; else it was converted to canonical form.
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


def convert_adapter(
    source: Source,
    reader: AdapterFormat,
    target: Path,
    *,
    to_format: str | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    canonical: bool = False,
    one_rank: bool = False,
    experts: ExpertLayout | None = None,
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    force: bool = False,
    strict: bool = False,
    dry_run: bool = False,
) -> AdapterConversion:
    """Convert an adapter; parameters as in `loraformat.ops.convert.convert`.

    With ``one_rank`` all modules get one rank (see `loraformat.ops.adapter_output.one_rank`), and
    the base is called by its Hub id where that is known.

    Raises
    ------
    LoraFormatError
        Nothing appears at the target then, and a bundle is as it was.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        output = open_adapter_output(
            stack,
            target,
            [source.path],
            base=base,
            to_format=to_format,
            dtype=dtype,
            canonical=canonical,
            base_of_sources=canonical or dtype is not None or experts is not None,
            force=force,
            dry_run=dry_run,
            allow_base_mismatch=allow_base_mismatch,
            experts=experts,
        )
        lost = losses(reader, output.writer, source.path, strict=strict)
        adapter = stack.enter_context(
            open_adapter(
                source,
                reader=reader,
                base=output.checkpoint,
                allow_pickle=allow_pickle,
                conditional=output.slot is None,
            )
        )
        if one_rank:
            if output.checkpoint is not None:  # of one rank are those that are written
                adapter = rearranged(adapter, output.checkpoint, experts)
            named = _repository(base, output.base) or adapter.base_model
            adapter = replace(with_one_rank(adapter, output.checkpoint), base_model=named)
        manifest, listed = listing(source.path)
        notes = [] if manifest is None or listed is not None else [_UNLISTED]
        if listed is not None:
            check_listed(SafeDirectory(source.path), listed)
            adapter = replace(adapter, files=tuple(f for f in adapter.files if f.path in listed))
        planned = output.plan(adapter, listed)
        report = _report(source, target, planned, lost, [*notes, *output.check_fits(adapter)])
        if dry_run:
            return with_estimate(report, output.forecast(planned))
        nbytes, said = output.publish(planned, finish=adapter.close)
    seconds = time.perf_counter() - began
    return replace(report, output_bytes=nbytes, seconds=seconds, notes=[*report.notes, *said])


def _repository(named: str | Path | None, base: AdapterBase | None) -> str | None:
    """Return the Hub id of a base; None if it has none."""
    if base is not None and "repo" in base.source:
        return base.source["repo"]
    return resolve(named).repo if named is not None else None


def _report(
    source: Source, target: Path, planned: PlannedAdapter, lost: list[str], notes: list[str]
) -> AdapterConversion:
    adapter = planned.adapter
    parameters = sum(tensor.count for tensor in tensors_of(adapter))
    if planned.verbatim:
        estimate = sum(file.nbytes for file in adapter.files)
    else:
        dtype = planned.options.dtype
        estimate = sum(t.count * ITEM_BYTES.get(dtype or t.dtype, 2) for t in tensors_of(adapter))
    return AdapterConversion(
        source=source.repo or str(source.path),
        target=str(target),
        source_format=adapter.format,
        target_format=planned.writer.name,
        verbatim=planned.verbatim,
        modules=len(adapter.deltas.keys() | adapter.replacements.keys() | adapter.rows.keys()),
        parameters=parameters,
        ranks=sorted({delta.rank for delta in adapter.deltas.values()}),
        input_bytes=sum(path.stat().st_size for path in adapter.sources),
        output_bytes=estimate,
        base_model=adapter.base_model,
        base_fingerprint=adapter.base_fingerprint,
        notes=[*adapter.notes, *notes, *planned.notes],
        lost=lost,
    )
