"""Combination: one adapter from several, on the deltas that they have in effect.

What is combined is Dᵢ = sᵢ·Bᵢ Aᵢ with each module's own resolved scaling, never A and B by
themselves: factors of different adapters live in different bases.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from loraformat import lora
from loraformat.adapter import Adapter, LoraDelta, RowReplacement
from loraformat.checkpoint import DenseTensor
from loraformat.errors import InputError, UnsupportedError, UsageError, printable
from loraformat.interference import drop, elect, magnitude_threshold, prune
from loraformat.ops.factors import (
    LastOnly,
    Pair,
    delta_of,
    factor_dtype,
    finite,
    in_memory,
    rebuilt,
)
from loraformat.subspace import block_krylov

__all__ = [
    "METHODS",
    "CombinationReport",
    "CombineOptions",
    "CombinedModule",
    "Method",
    "combine",
    "combine_adapters",
]

Method = Literal["svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)
_EXACT = ("svd", "cat", "linear")
_TILE_ELEMENTS = 1 << 22
_ROUNDING = 1e-12

#: (weight with scaling, delta), of the adapters that have a target.
_Terms = list[tuple[int, float, LoraDelta]]


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """How to combine.

    Attributes
    ----------
    method : str
        ``svd``: the exact weighted sum, then its best approximation of `rank`. ``cat``: the
        exact sum as concatenated factors. ``linear``: the exact sum at the least rank that
        holds it. ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: see
        `loraformat.interference`; the result has full rank and is approximated.
    rank : int or None
        Of each module; by default the largest of its adapters'. Not for ``cat``.
    density : float
        Share of elements that pruning and dropping keep.
    seed : int
        Of random dropping.
    dtype : str or None
        Of the new factors.
    """

    method: Method = "svd"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}, wanted one of {', '.join(METHODS)}")
        if self.method == "cat" and self.rank is not None:
            raise UsageError("cat keeps every rank; use svd to choose one")
        if self.rank is not None and self.rank < 1:
            raise UsageError("rank is at least 1")
        if not 0 < self.density <= 1:
            raise UsageError(f"density is a share above 0 and up to 1, not {self.density}")


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """What became of one module.

    Attributes
    ----------
    target : str
    ranks : list of int
        Of the adapters that change it.
    rank : int
        Of the result.
    energy : float
        Share of the combined delta's squared norm that this rank holds.
    error : float
        √(1 − energy).
    """

    target: str
    ranks: list[int]
    rank: int
    energy: float
    error: float


@dataclass(frozen=True, slots=True)
class CombinationReport:
    """What a combination did.

    Attributes
    ----------
    sources : list of str
    target : str
    method : str
    weights : list of float
    modules : list of CombinedModule
    parameters : int
    notes : list of str
    seconds : float
    """

    sources: list[str]
    target: str
    method: str
    weights: list[float]
    modules: list[CombinedModule]
    parameters: int
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return asdict(self)


def combine(
    sources: Sequence[str | Path],
    target: str | Path,
    options: CombineOptions | None = None,
    *,
    weights: Sequence[float] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CombinationReport:
    """Combine adapters and write the result.

    Parameters
    ----------
    sources : sequence of str or Path
        Adapters in any format, or Hub ids.
    target : str or Path
        A PEFT directory; it must not exist, unless ``force``.
    options : CombineOptions, optional
    weights : sequence of float, optional
        One for each adapter, 1 by default; negative ones subtract.
    force : bool
    progress : callable
        Called with bytes done and in total.

    Returns
    -------
    CombinationReport
    """
    from loraformat.ops.adapters import open_adapter, write_adapter

    began = time.perf_counter()
    with ExitStack() as stack:
        adapters = [stack.enter_context(open_adapter(source)) for source in sources]
        result, report = combine_adapters(adapters, options, weights=weights, progress=progress)
        write_adapter(result, Path(target), force=force)
    return replace(
        report,
        sources=[str(source) for source in sources],
        target=str(target),
        seconds=time.perf_counter() - began,
    )


def combine_adapters(
    adapters: Sequence[Adapter],
    options: CombineOptions | None = None,
    *,
    weights: Sequence[float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Adapter, CombinationReport]:
    """Return one adapter from several, and what each module of it holds.

    Parameters
    ----------
    adapters : sequence of Adapter
        They must stay open until the result is written.
    options : CombineOptions, optional
    weights : sequence of float, optional
    progress : callable

    Returns
    -------
    Adapter
    CombinationReport

    Raises
    ------
    UsageError
        If the weights do not fit the adapters.
    UnsupportedError
        For what has no weighted sum: DoRA, whole tensors that differ.
    InputError
        If adapters disagree on a module's dimensions.
    """
    options = options or CombineOptions()
    weights = _weights(adapters, weights)
    _refuse_dora(adapters)
    targets = list(dict.fromkeys(target for adapter in adapters for target in adapter.deltas))
    memo, deltas, modules = LastOnly(), {}, []
    for number, target in enumerate(targets, 1):
        terms = _terms(adapters, weights, target)
        combined, module = _combine_module(terms, options, memo)
        modules.append(module)
        if module.rank:
            deltas[target] = combined
        progress(number, len(targets))
    if targets and not deltas:
        raise InputError("the weighted sum of the adapters is zero in every module")
    notes = _notes(adapters, deltas, modules)
    result = replace(
        rebuilt(adapters[0], deltas),
        replacements=_shared_replacements(adapters, weights),
        rows=_shared_rows(adapters, weights),
        sources=tuple(path for adapter in adapters for path in adapter.sources),
        notes=tuple(notes),
        base_fingerprint=_common([adapter.base_fingerprint for adapter in adapters]),
    )
    parameters = sum(delta.parameters for delta in deltas.values())
    paths = [str(adapter.path) for adapter in adapters]
    return result, CombinationReport(
        paths, "", options.method, list(weights), modules, parameters, notes
    )


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> Sequence[float]:
    weights = weights or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters")
    if not adapters:
        raise UsageError("combine wants at least one adapter")
    if not all(torch.isfinite(torch.tensor(weights))):
        raise UsageError("weights are finite numbers")
    return weights


def _refuse_dora(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        for delta in adapter.deltas.values():
            if delta.magnitude is not None:
                raise UnsupportedError(
                    f"{printable(delta.target)} has a DoRA magnitude, whose effect depends on the "
                    "base and has no weighted sum",
                    path=adapter.path,
                    hint="merge it into its base, extract the difference "
                    "(loraformat merge, then extract), and combine that",
                )


def _terms(adapters: Sequence[Adapter], weights: Sequence[float], target: str) -> _Terms:
    found = [
        (i, weight * adapter.deltas[target].scaling, adapter.deltas[target])
        for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
        if target in adapter.deltas
    ]
    first = found[0][2]
    for i, _, delta in found[1:]:
        same = _dimensions(delta) == _dimensions(first)
        if not same:
            raise InputError(
                f"{printable(target)} is {_dimensions(delta)} here and {_dimensions(first)} in "
                f"{printable(adapters[found[0][0]].path)}",
                path=adapters[i].path,
                hint="adapters can only be combined if they are for the same base",
            )
    return found


def _dimensions(delta: LoraDelta) -> tuple[object, ...]:
    experts = delta.a.shape[:-2]
    return (*experts, delta.out_features, delta.in_features, delta.orientation)


def _combine_module(
    terms: _Terms, options: CombineOptions, memo: LastOnly
) -> tuple[LoraDelta, CombinedModule]:
    exact = options.method in _EXACT
    rank, energy, compute = (_exact if exact else _approximate)(terms, options)
    deltas = [delta for _, _, delta in terms]
    names = {factor_dtype(delta, options.dtype) for delta in deltas}
    stored = names.pop() if len(names) == 1 else "F32"
    combined = replace(
        delta_of(deltas[0], rank, stored, compute, memo),
        bias=_bias(terms, stored),
        second_moment=None,
    )
    ranks = [delta.rank for delta in deltas]
    error = max(1 - energy, 0.0) ** 0.5
    return combined, CombinedModule(deltas[0].target, ranks, rank, energy, error)


def _loaded(terms: _Terms) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    return [
        (weight, finite(delta.b).double(), finite(delta.a).double()) for _, weight, delta in terms
    ]


def _exact(terms: _Terms, options: CombineOptions) -> tuple[int, float, Callable[[], Pair]]:
    if options.method == "cat":
        return sum(delta.rank for _, _, delta in terms), 1.0, lambda: _concatenated(terms)
    b, a = lora.combine_factors(_loaded(terms))
    values = lora.singular_values(b, a)
    pooled = values.square().sum(0).sqrt() if values.ndim == 2 else values
    # What a sum cancels is zero up to the rounding of what it is a sum of.
    scale = float(b.norm() * a.norm())
    held = int((pooled > _ROUNDING * scale).sum())
    largest = max(delta.rank for _, _, delta in terms)
    wanted = options.rank or (largest if options.method == "svd" else held)
    least = int(any(delta.bias is not None for _, _, delta in terms))  # a bias needs a module
    rank = max(min(wanted, held), least)

    def compute() -> Pair:
        return lora.truncate(lora.core(*lora.combine_factors(_loaded(terms))), rank, torch.float64)

    total = float(pooled.square().sum())
    return rank, float(pooled[:rank].square().sum()) / total if total else 1.0, compute


def _concatenated(terms: _Terms) -> Pair:
    """Return [√|w₁|·B₁ …] and [±√|w₁|·A₁ …]: the weight shared, so that neither overflows."""
    b, a = zip(*((b * abs(w) ** 0.5, a * _root(w)) for w, b, a in _loaded(terms)), strict=True)
    return torch.cat(b, dim=-1), torch.cat(a, dim=-2)


def _root(weight: float) -> float:
    return math.copysign(math.sqrt(abs(weight)), weight)


def _approximate(terms: _Terms, options: CombineOptions) -> tuple[int, float, Callable[[], Pair]]:
    wanted = options.rank or max(delta.rank for _, _, delta in terms)
    name = terms[0][2].target
    pieces = [
        _approximate_one(one, options, wanted, f"{name}/{expert}")
        for expert, one in enumerate(_by_expert(terms))
    ]
    kept = sum(kept for _, _, kept, _ in pieces)
    total = sum(total for _, _, _, total in pieces)
    b, a = torch.stack([piece[0] for piece in pieces]), torch.stack([p[1] for p in pieces])
    if len(terms[0][2].a.shape) == 2:
        b, a = b[0], a[0]
    return a.shape[-2] if total else 0, kept / total if total else 1.0, lambda: (b, a)


def _by_expert(terms: _Terms) -> Iterator[list[tuple[int, float, torch.Tensor, torch.Tensor]]]:
    loaded = [(i, weight, finite(delta.b), finite(delta.a)) for i, weight, delta in terms]
    if loaded[0][2].ndim == 2:
        yield loaded
        return
    for expert in range(len(loaded[0][2])):
        yield [(i, weight, b[expert], a[expert]) for i, weight, b, a in loaded]


def _approximate_one(
    loaded: list[tuple[int, float, torch.Tensor, torch.Tensor]],
    options: CombineOptions,
    rank: int,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return factors, and how much of the squared norm they hold of how much."""
    merged = _interfere(loaded, options, name)
    found = block_krylov(lambda: iter([(0, merged)]), (merged.shape[0], merged.shape[1]), rank)
    b, a = found.factors(rank)
    return b, a, float(found.values[:rank].square().sum()), found.squared_norm


def _interfere(
    loaded: list[tuple[int, float, torch.Tensor, torch.Tensor]],
    options: CombineOptions,
    name: str,
) -> torch.Tensor:
    """Return the combined delta of one matrix, dense; its inputs only exist in row tiles."""
    rows, columns = len(loaded[0][2]), loaded[0][3].shape[1]
    height = max(1, _TILE_ELEMENTS // columns)
    factors = [(weight, b.float(), a.float()) for _, weight, b, a in loaded]
    random = [_generator(options.seed, i, name) for i, *_ in loaded]
    pruning = options.method in ("ties", "magnitude_prune")
    keep = max(1, int(options.density * rows * columns))
    thresholds = [_threshold(b, a, height, keep) if pruning else 0.0 for _, b, a in factors]
    merged = torch.empty(rows, columns)
    for first in range(0, rows, height):
        tiles: list[torch.Tensor] = []
        for (weight, b, a), threshold, source in zip(factors, thresholds, random, strict=True):
            tile = b[first : first + height] @ a
            tile = prune(tile, threshold) if pruning else drop(tile, options.density, source)
            tiles.append(weight * tile)
        electing = options.method in ("ties", "dare_ties")
        merged[first : first + height] = elect(tiles) if electing else torch.stack(tiles).sum(0)
    return merged


def _threshold(b: torch.Tensor, a: torch.Tensor, height: int, keep: int) -> float:
    starts = range(0, len(b), height)
    return magnitude_threshold(lambda: (b[i : i + height] @ a for i in starts), keep)


def _generator(*words: int | str) -> torch.Generator:
    """Seed from the name, so that no module's numbers depend on the others."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _bias(terms: _Terms, dtype: str) -> DenseTensor | None:
    parts = [(w, delta.bias) for _, w, delta in terms if delta.bias is not None]
    if not parts:
        return None
    total = sum(weight * finite(bias).double() for weight, bias in parts)
    assert isinstance(total, torch.Tensor)
    return in_memory(parts[0][1].name, total, dtype)


def _shared_replacements(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, DenseTensor]:
    """Return whole tensors that are the same wherever they are replaced."""
    shared: dict[str, DenseTensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, tensor in adapter.replacements.items():
            other = shared.setdefault(name, tensor)
            if weight != 1 or not _same(other, tensor):
                raise _no_sum(name, adapter)
    return shared


def _shared_rows(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, RowReplacement]:
    shared: dict[str, RowReplacement] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, rows in adapter.rows.items():
            other = shared.setdefault(name, rows)
            same = other.indices == rows.indices and _same(other.rows, rows.rows)
            if weight != 1 or not same:
                raise _no_sum(name, adapter)
    return shared


def _same(one: DenseTensor, other: DenseTensor) -> bool:
    if one is other:
        return True
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and one.load() == other.load()


def _no_sum(name: str, adapter: Adapter) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(name)} is replaced as a whole: it has no weight, and two that differ no sum",
        path=adapter.path,
        hint="merge each adapter into its base, extract the differences, and combine those",
    )


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _notes(
    adapters: Sequence[Adapter], deltas: dict[str, LoraDelta], modules: list[CombinedModule]
) -> list[str]:
    notes = []
    names = sorted({adapter.base_model for adapter in adapters if adapter.base_model})
    if len(names) > 1:
        notes.append(f"the adapters name different bases: {', '.join(names)}")
    if len({a.base_fingerprint for a in adapters if a.base_fingerprint}) > 1:
        notes.append("the adapters were made for bases with different fingerprints")
    if any(d.second_moment for adapter in adapters for d in adapter.deltas.values()):
        notes.append(
            "activation statistics are not carried over: they say nothing of how the adapters' "
            "inner activations go together"
        )
    if gone := len(modules) - len(deltas):
        notes.append(f"{gone} modules cancel to zero and are left out")
    return notes
