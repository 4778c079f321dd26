"""Merged tensors, lazily: an edit becomes a dense tensor that is computed when it is loaded.

A tensor is walked over in tiles of whole rows. For each one the delta is formed, added and
rounded; nothing of the size of the delta is ever held. What the report says is measured on
the way, on rows spread evenly over large tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from loraformat.adapter import Adapter, LoraDelta
from loraformat.checkpoint import DenseTensor, LazyTensor, NF4Tensor, tensor_view
from loraformat.dtypes import torch_dtype
from loraformat.errors import UnsupportedError, printable
from loraformat.fixed_point import Product, merge_values, product
from loraformat.kernels import threads
from loraformat.ops.change import Meter, Sums, measure_tile
from loraformat.ops.edits import Edit, Term

__all__ = [
    "TILE_ELEMENTS",
    "Matrix",
    "Recorder",
    "block_matrices",
    "for_each",
    "merged_tensor",
    "tiles",
]

#: Elements of a tile: it and what is computed from it stay in the cache.
TILE_ELEMENTS = 1 << 16

_FLOATS = ("F32", "F16", "BF16")


class Recorder(Protocol):
    """Sees every tile of a merge, in order, to write down what rounding loses."""

    def encode(
        self,
        weight: torch.Tensor,
        delta: torch.Tensor,
        gain: torch.Tensor | None,
        merged: torch.Tensor,
    ) -> Any:
        """Return what is lost of a tile; called from several threads."""

    def keep(self, encoded: Any, elements: int) -> None:
        """Take what `encode` returned of the next tile, in order."""

    def gains(self, gains: torch.Tensor) -> None:
        """Take DoRA's gains of one term of one block, float32, before the block's tiles."""

    def finish(self, source: memoryview, rows: Sequence[int] = ()) -> None:
        """Take the whole original, and which of its rows were replaced."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a stored tensor, and the low-rank terms that are added to it.

    Attributes
    ----------
    shape : tuple of int
        As stored: rows, columns.
    transposed : bool
        Output features run along the columns.
    factors : tuple of (b, a, scale, magnitude)
        float64 B (out, r) and A (r, in), the scaling, DoRA's magnitudes or None.
    weights : tuple of float
        The user's, one per factor.
    """

    shape: tuple[int, int]
    transposed: bool
    factors: tuple[tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None], ...]
    weights: tuple[float, ...]

    @cached_property
    def has_gain(self) -> bool:
        """Whether any term is DoRA's."""
        return any(magnitude is not None for *_, magnitude in self.factors)

    def measured_gains(self, weight: Callable[[int, int], torch.Tensor]) -> list[torch.Tensor]:
        """Return each DoRA term's m / ‖W + D‖ by output feature, in float32.

        Parameters
        ----------
        weight : callable
            Returns rows of the original.
        """
        return [
            self._gain(b, a, scaling, magnitude, weight)
            for b, a, scaling, magnitude in self.factors
            if magnitude is not None
        ]

    def _gain(
        self, b: torch.Tensor, a: torch.Tensor, scaling: float, magnitude: torch.Tensor, weight: Any
    ) -> torch.Tensor:
        delta = product(*self._oriented(b * scaling, a), exact=False)
        pieces = list(tiles(*self.shape))
        sums: list[torch.Tensor] = [torch.empty(0)] * len(pieces)

        def work(number: int) -> None:
            start, stop = pieces[number]
            values = (weight(start, stop).float() + delta.rows(start, stop)).square()
            sums[number] = values.sum(0 if self.transposed else 1, dtype=torch.float64)

        for_each(work, len(pieces))
        squares = torch.stack(sums).sum(0) if self.transposed else torch.cat(sums)
        norms = squares.sqrt()
        return torch.where(norms > 0, magnitude / norms, 0.0).float()

    def _oriented(self, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (a.T, b.T) if self.transposed else (b, a)

    def combined(
        self, gains: Sequence[torch.Tensor], *, exact: bool
    ) -> tuple[Product, torch.Tensor | None]:
        """Return the sum of all terms as one product, and the gain of each row.

        With DoRA's gain gᵢ and the user's weight ωᵢ the merged weight is

            W + Σ ωᵢ (gᵢ (W + Dᵢ) − W) = G · (W + Σ (ωᵢ gᵢ / G) Dᵢ),   G = 1 + Σ ωᵢ (gᵢ − 1)

        so that it stays one low-rank delta and one gain; gᵢ = 1 without DoRA.
        """
        rows = self.factors[0][0].shape[0]
        total = torch.ones(rows, dtype=torch.float64)
        by_term, left = [], iter(gains)
        for (*_, magnitude), user in zip(self.factors, self.weights, strict=True):
            gain = torch.ones_like(total) if magnitude is None else next(left).double()
            by_term.append(gain)
            if magnitude is not None:
                total = gain.clone() if user == 1 and len(gains) == 1 else total + user * (gain - 1)
        rounded = total.float()
        divisor = torch.where(rounded == 0, torch.inf, rounded.double())
        scaled = [
            b * (user * scaling * gain / divisor)[:, None]
            for (b, _, scaling, _), user, gain in zip(
                self.factors, self.weights, by_term, strict=True
            )
        ]
        b = torch.cat(scaled, 1)
        a = torch.cat([a for _, a, _, _ in self.factors])
        along = rounded[None, :] if self.transposed else rounded[:, None]
        return product(*self._oriented(b, a), exact=exact), along if self.has_gain else None


def tiles(rows: int, columns: int, elements: int = TILE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Cut a matrix into runs of whole rows, of at most this many elements but at least one row."""
    step = max(1, elements // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def for_each(work: Callable[[int], None], count: int) -> None:
    """Call ``work`` with every number, on all CPUs, each torch operation on one.

    torch's own threads wait for each other after every operation; on a shared machine, and
    with tiles this small, that costs more than it brings.
    """
    before = torch.get_num_threads()

    def task(start: int, stop: int) -> None:
        torch.set_num_threads(1)
        for number in range(start, stop):
            work(number)

    try:
        threads.run(task, count, 1)
    finally:
        torch.set_num_threads(before)


def block_matrices(
    shape: tuple[int, ...], terms: Sequence[Term], adapters: Sequence[Adapter]
) -> Iterator[Matrix | None]:
    """Return what is added to each matrix of a stored tensor, a stack of them; None for nothing.

    A vector is a matrix of one row.
    """
    stack = shape[0] if len(shape) == 3 else 1
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    by_block: dict[int, list[Term]] = {}
    for term in terms:
        by_block.setdefault(term.block, []).append(term)
    for block in range(stack):
        own = by_block.get(block, [])
        yield _matrix((rows, columns), own, adapters) if own else None


def _matrix(shape: tuple[int, int], terms: list[Term], adapters: Sequence[Adapter]) -> Matrix:
    deltas = [adapters[term.adapter].deltas[term.target] for term in terms]
    transposed = {delta.orientation == "transposed" and t.part == "delta"
                  for delta, t in zip(deltas, terms, strict=True)}  # fmt: skip
    if len(transposed) > 1:
        raise UnsupportedError(
            f"two adapters see {printable(terms[0].target)} in different orientations"
        )
    try:
        factors = tuple(_factors(delta, term) for delta, term in zip(deltas, terms, strict=True))
    except UnsupportedError as error:
        error.path = error.path or str(adapters[terms[0].adapter].path)
        raise
    return Matrix(shape, transposed.pop(), factors, tuple(term.weight for term in terms))


def _factors(
    delta: LoraDelta, term: Term
) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]:
    scaling = delta.scaling
    if term.part == "bias":
        assert delta.bias is not None
        a = _finite(delta.bias, delta.bias.torch())[None, :]
        return torch.ones(1, 1, dtype=torch.float64), a, scaling, None
    a, b = delta.a.torch(), delta.b.torch()
    magnitude = None if delta.magnitude is None else delta.magnitude.torch().reshape(-1)
    if term.expert is not None:
        a, b = a[term.expert], b[term.expert]
    if term.rows is not None:
        b = b[slice(*term.rows)]
        magnitude = None if magnitude is None else magnitude[slice(*term.rows)]
    if magnitude is not None:
        assert delta.magnitude is not None
        magnitude = _finite(delta.magnitude, magnitude)
    return _finite(delta.b, b), _finite(delta.a, a), scaling, magnitude


def _finite(tensor: DenseTensor, values: torch.Tensor) -> torch.Tensor:
    values = values.double()
    if not bool(torch.isfinite(values).all()):
        raise UnsupportedError(
            f"tensor {printable(tensor.name)} holds NaN or infinity",
            hint="the training has diverged; use an earlier checkpoint of the adapter",
        )
    return values


def merged_tensor(
    edit: Edit,
    source: LazyTensor | None,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    dtype: str | None,
    *,
    exact: bool = False,
    meter: Meter | None = None,
    recorder: Recorder | None = None,
) -> DenseTensor:
    """Return a tensor with its edit; it is computed when it is loaded.

    Parameters
    ----------
    edit : Edit
    source : LazyTensor or None
        What it starts from; None if it is new.
    adapters, weights
        As the edit counts them.
    dtype : str or None
        safetensors name of the output; the source's own by default.
    exact : bool
        See `loraformat.fixed_point.product`.
    meter : Meter, optional
        Takes what the report says.
    recorder : Recorder, optional
        Takes what undoing needs.

    Raises
    ------
    UnsupportedError
        If the weights are of no type that can be merged.
    """
    start = source if source is not None else edit.replacement[1] if edit.replacement else None
    assert start is not None
    if start.dtype not in _FLOATS:
        raise UnsupportedError(
            f"tensor {printable(edit.name)} is {start.dtype}, and only F32, F16, BF16 and NF4 "
            "weights can be merged",
            hint="convert the base with --dtype first",
        )
    made = _Merged(edit, source, adapters, weights, dtype or start.dtype, exact, meter, recorder)
    release = source.release if source is not None else start.release
    return DenseTensor(edit.name, made.dtype, start.shape, made.load, release)


@dataclass(frozen=True)
class _Merged:
    edit: Edit
    source: LazyTensor | None
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    dtype: str
    exact: bool
    meter: Meter | None
    recorder: Recorder | None

    def load(self) -> memoryview:
        original = self._original()
        start = self._replaced(original)
        if not self.edit.terms and self.recorder is None:
            merged = merge_values(start, torch.zeros(()), None, torch_dtype(self.dtype))
        else:
            merged = self._walk(start)
        if self.recorder is not None:
            rows = [i for n in self.edit.rows for i in self._rows_of(self.adapters[n]).indices]
            whole = memoryview(b"") if original is None else _bytes_of(original)
            self.recorder.finish(whole, rows)
        return _bytes_of(merged)

    def _original(self) -> torch.Tensor | None:
        if isinstance(self.source, NF4Tensor):
            return self.source.dequantize("F32").contiguous()
        if self.source is None:
            return None
        return tensor_view(self.source.load(), self.source.dtype, self.source.shape)

    def _replaced(self, original: torch.Tensor | None) -> torch.Tensor:
        """Put replacements in; with a weight ω they are W + ω (R − W)."""
        values = original
        if self.edit.replacement is not None:
            number, tensor = self.edit.replacement
            values = _blend(original, _finite_as_stored(tensor), self.weights[number])
        assert values is not None
        for number in self.edit.rows:
            rows = self._rows_of(self.adapters[number])
            index = torch.tensor(rows.indices, dtype=torch.long)
            values = values.clone() if values is original else values
            new = _blend(values[index], _finite_as_stored(rows.rows), self.weights[number])
            if new.dtype != values.dtype:
                values = values.float()
            values[index] = new.to(values.dtype)
        return values

    def _rows_of(self, adapter: Adapter) -> Any:
        found = adapter.rows.get(self.edit.name) or adapter.rows.get(self.edit.source or "")
        return found or next(iter(adapter.rows.values()))  # of the embedding a head was tied to

    def _walk(self, start: torch.Tensor) -> torch.Tensor:
        shape = tuple(start.shape)
        merged = torch.empty(shape, dtype=torch_dtype(self.dtype))
        columns = shape[-1] if shape else 1
        height = shape[-2] if len(shape) > 1 else 1
        weights, results = (t.view(-1, height, columns) for t in (start, merged))
        matrices = block_matrices(shape, self.edit.terms, self.adapters)
        for weight, result, matrix in zip(weights, results, matrices, strict=True):
            self._merge_matrix(weight, result, matrix)
        return merged

    def _merge_matrix(
        self, weight: torch.Tensor, result: torch.Tensor, matrix: Matrix | None
    ) -> None:
        deltas, gain = None, None
        if matrix is not None:
            gains = matrix.measured_gains(lambda start, stop: weight[start:stop])
            if self.recorder is not None:
                for found in gains:
                    self.recorder.gains(found)
            deltas, gain = matrix.combined(gains, exact=self.exact)
        pieces = list(tiles(*weight.shape))
        measured: list[Sums | None] = [None] * len(pieces)
        encoded: list[Any] = [None] * len(pieces)

        def work(number: int) -> None:
            start, stop = pieces[number]
            delta = torch.zeros(()) if deltas is None else deltas.rows(start, stop)
            own = gain if gain is None or len(gain) == 1 else gain[start:stop]
            part = weight[start:stop]
            values = merge_values(part, delta, own, result.dtype)
            result[start:stop] = values
            if self.meter is not None and deltas is not None:
                measured[number] = measure_tile(part, delta, own, values)
            if self.recorder is not None:
                encoded[number] = self.recorder.encode(part, delta, own, values)

        for_each(work, len(pieces))
        for number, (start, stop) in enumerate(pieces):
            sums = measured[number]
            if self.meter is not None and sums is not None:
                self.meter.add(self.edit.name, sums)
            if self.recorder is not None:
                self.recorder.keep(encoded[number], (stop - start) * weight.shape[1])


def _finite_as_stored(tensor: DenseTensor) -> torch.Tensor:
    _finite(tensor, tensor.torch())
    return tensor.torch()


def _blend(original: torch.Tensor | None, new: torch.Tensor, weight: float) -> torch.Tensor:
    if weight == 1 or original is None:
        return new
    return original.float() + weight * (new.float() - original.float())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
