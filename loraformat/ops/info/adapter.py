"""Describing an adapter without reading its factors: what `loraformat info` shows of one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraformat.bundle.update import parse_bundle_slot, read_manifest
from loraformat.errors import UnsupportedError
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.ops.convert.adapter import tensors_of
from loraformat.plugins import AdapterReadOptions, Converter

__all__ = ["AdapterDescription", "ModuleSummary", "describe_adapter", "description_of"]


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """One weight that an adapter changes: W + scaling · B A."""

    target: str
    rank: int
    alpha: float
    scaling: float
    out_features: int
    in_features: int
    dtype: str
    parameters: int
    dora: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """An adapter.

    Attributes
    ----------
    path, format : str
    ranks : list of int
        Every rank that occurs, from the shapes of the factors.
    alphas, scalings : list of float
        Every α, and every factor of B A, that occurs.
    targets : list of str
        Last names of the modules.
    parameters, bytes : int
        Elements of all tensors; size of all files.
    dtypes : dict of str to int
        Parameters by dtype.
    base_model, base_fingerprint : str or None
        What it says of its base.
    bundle : str or None
        The bundle whose manifest lists it.
    dora, biases, embeddings : int
        How many modules have a magnitude, a bias, or are embeddings.
    replacements : list of str
        Weights that it replaces as a whole.
    replaced_rows : list of str
        Weights of which it replaces rows.
    notes : list of str
    modules : list of ModuleSummary
    kind : str
        ``"adapter"``, always.
    """

    path: str
    format: str
    ranks: list[int]
    alphas: list[float]
    scalings: list[float]
    targets: list[str]
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    base_model: str | None
    base_fingerprint: str | None
    bundle: str | None
    dora: int
    biases: int
    embeddings: int
    replacements: list[str]
    replaced_rows: list[str]
    notes: list[str] = field(default_factory=list)
    modules: list[ModuleSummary] = field(default_factory=list)
    kind: str = "adapter"

    def to_json(self, *, tensors: bool) -> dict[str, Any]:
        """Return JSON members, with or without the list of modules."""
        members = asdict(self)
        if not tensors:
            del members["modules"]
        return members


def describe_adapter(
    path: Path, reader: Converter, *, allow_pickle: bool = False
) -> AdapterDescription:
    """Describe an adapter.

    Parameters
    ----------
    path : Path
    reader : Converter
        Of adapters.
    allow_pickle : bool

    Raises
    ------
    LoraFormatError
        If it cannot be opened.
    """
    if reader.read_adapter is None:
        raise UnsupportedError(f"is {reader.name}, which can be written but not read", path=path)
    options = AdapterReadOptions(None, allow_pickle, conditional=True, inspect=True)
    with reader.read_adapter(path, options) as adapter:
        return description_of(adapter, path)


def description_of(adapter: Adapter, path: Path) -> AdapterDescription:
    """Describe an adapter that is open."""
    deltas = list(adapter.deltas.values())
    tensors = list(tensors_of(adapter))
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.stored_as] = dtypes.get(tensor.stored_as, 0) + tensor.count
    return AdapterDescription(
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
    return [f"aLoRA: acts only from the tokens {tokens} on"] if tokens else []


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
