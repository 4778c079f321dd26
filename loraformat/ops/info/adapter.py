"""Description of an adapter without reading its factors."""

from __future__ import annotations

from pathlib import Path

from loraformat.bundle.update import parse_bundle_slot, read_manifest
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.description import AdapterInfo, ModuleSummary
from loraformat.ops.adapter_output.form import tensors_of

__all__ = ["AdapterInfo", "ModuleSummary", "description_of"]


def description_of(adapter: Adapter, path: Path) -> AdapterInfo:
    """Describe an open adapter."""
    deltas = list(adapter.deltas.values())
    tensors = list(tensors_of(adapter))
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.stored_as] = dtypes.get(tensor.stored_as, 0) + tensor.count
    return AdapterInfo(
        path=str(path),
        format=adapter.format,
        ranks=sorted({delta.rank for delta in deltas}),
        alphas=sorted({delta.alpha for delta in deltas}),
        scalings=sorted({delta.scaling for delta in deltas}),
        targets=sorted({_leaf(delta.target) for delta in deltas}),
        parameters=sum(tensor.count for tensor in tensors),
        bytes=sum(source.stat().st_size for source in adapter.sources),
        dtypes=dtypes,
        base_model=adapter.base_model,
        base_fingerprint=adapter.base_fingerprint,
        bundle=_bundle(path),
        dora=sum(delta.magnitude is not None for delta in deltas),
        biases=sum(delta.bias is not None for delta in deltas),
        embeddings=sum("embed" in _leaf(delta.target) for delta in deltas),
        replacements=sorted(adapter.replacements),
        replaced_rows=sorted(adapter.rows),
        notes=[*adapter.notes, *_acts_on(adapter)],
        modules=[_module(delta) for delta in deltas],
    )


def _acts_on(adapter: Adapter) -> list[str]:
    tokens = ", ".join(map(str, adapter.invocation_tokens))
    return [f"aLoRA: active only from the tokens {tokens} on"] if tokens else []


def _bundle(path: Path) -> str | None:
    place = parse_bundle_slot(path)
    listed = place is not None and place.name in read_manifest(place.bundle).adapters
    return str(place.bundle) if place is not None and listed else None


def _leaf(target: str) -> str:
    return target.removesuffix(".weight").rpartition(".")[2]


def _module(delta: LoraDelta) -> ModuleSummary:
    return ModuleSummary(
        target=delta.target,
        rank=delta.rank,
        alpha=delta.alpha,
        scaling=delta.scaling,
        out_features=delta.out_features,
        in_features=delta.in_features,
        dtype=delta.a.dtype,
        parameters=delta.parameters,
        dora=delta.magnitude is not None,
        bias=delta.bias is not None,
    )
