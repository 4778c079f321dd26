"""Conversion between lazy tensors and factor matrices.

The algebra of adapters is lazy like everything else: the shapes of a result are decided
from singular values, and its factors are computed when a writer loads them, one module
at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy

from loraformat.algebra import lora
from loraformat.algebra.lora import Pair
from loraformat.bundle.run_paths import CURVE_NAME
from loraformat.errors import InputError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import CarriedFile, DenseTensor
from loraformat.storage import strict_json
from loraformat.tensors.arrays import Array, array_bytes, check_finite, finite, numpy_dtype
from loraformat.tensors.dtypes import WEIGHT_DTYPES, parse_weight_dtype

__all__ = [
    "SingleEntryCache",
    "compute_factors",
    "error_with_rounding",
    "experts_of",
    "factor_dtype",
    "in_memory",
    "lazy_delta",
    "load_finite",
    "rounded",
    "with_deltas",
]

#: Members of PEFT's config that say how a product is scaled, or how large it is.
_SCALING = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")
_RECORD = "training_record.json"
_OF_THE_OLD = ("adapter_config.json", CURVE_NAME, _RECORD)
_MAX_RECORD_BYTES = 16 << 20


def load_finite(tensor: DenseTensor) -> Array:
    """Load a tensor as float32 (float64 stays) and release the source.

    Float64 comes where sums are formed: see `loraformat.algebra.thin_qr`.

    Raises
    ------
    InputError
        If it holds NaN or infinity: no decomposition survives one.
    """
    values = tensor.array().astype("f8" if tensor.dtype == "F64" else "f4")
    tensor.release()
    check_finite(values, tensor.name)
    return values


def factor_dtype(delta: LoraDelta, wanted: str | None) -> str:
    """Return the safetensors dtype for a module's new factors.

    That is ``wanted`` (``f32``, ``f16``, ``bf16``); by default theirs, if both have the same.
    """
    if wanted is not None:
        return parse_weight_dtype(wanted)
    same = delta.a.dtype == delta.b.dtype and delta.a.dtype in WEIGHT_DTYPES.values()
    return delta.a.dtype if same else "F32"


def with_deltas(
    adapter: Adapter, deltas: dict[str, LoraDelta], others: Sequence[Adapter] = ()
) -> Adapter:
    """Return an adapter with new deltas, without data that described the old ones.

    Scalings are folded, so the config must not name any; files are those of `_derived_files`.
    ``others`` are what the deltas were computed from besides.
    """
    return replace(
        adapter,
        deltas=deltas,
        config={key: value for key, value in adapter.config.items() if key not in _SCALING},
        files=_derived_files([adapter, *others]),
        verbatim=False,
    )


def _derived_files(adapters: Sequence[Adapter]) -> tuple[CarriedFile, ...]:
    """Return the files of the first adapter that remain valid for the result.

    Tokenizer, licence and words come along. Weights, and pictures of how others were trained, do
    not; records of trainings become the history of the new one (``derived_from``), which was
    measured by none of them.
    """
    kept = tuple(file for file in adapters[0].files if not _is_of_the_old(file.path))
    records = [record for adapter in adapters for record in _records(adapter)]
    if not records:
        return kept
    data = (json.dumps({"derived_from": records}, indent=2, ensure_ascii=False) + "\n").encode()
    return (*kept, CarriedFile.of(_RECORD, data))


def _is_of_the_old(path: str) -> bool:
    return path.endswith(_WEIGHTS) or path.rsplit("/", 1)[-1] in _OF_THE_OLD


def _records(adapter: Adapter) -> Iterator[object]:
    for file in adapter.files:
        if file.path == _RECORD and file.nbytes <= _MAX_RECORD_BYTES:
            with contextlib.suppress(strict_json.StrictJsonError):
                yield strict_json.loads(file.read())


def experts_of(delta: LoraDelta) -> int:
    """Return the number of matrices in a delta."""
    return delta.a.shape[0] if len(delta.a.shape) == 3 else 1


class SingleEntryCache:
    """Cache of the last result, because A and B come from one computation."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: object = None

    def get(self, key: Hashable, compute: Callable[[], object]) -> object:
        """Return the cached value of a key, or compute and cache it."""
        if self._key != key:
            self._key = self._value = None  # free it before the next one is built
            self._value = compute()
            self._key = key
        return self._value


def in_memory(name: str, values: Array, dtype: str = "F32") -> DenseTensor:
    """Return a small array as a lazy tensor."""
    held = values.astype(numpy_dtype(dtype))
    return DenseTensor(name, dtype, held.shape, lambda: array_bytes(held))


def rounded(values: Array, dtype: str, name: str) -> Array:
    """Return a factor in the dtype that it is stored in, rounded to nearest even.

    Raises
    ------
    InputError
        If one lies beyond the dtype's range.
    """
    with numpy.errstate(over="ignore"):
        stored = values.astype(numpy_dtype(dtype), copy=False)
    if not finite(stored):
        raise InputError(
            f"tensor {printable(name)} would exceed the range of {dtype}",
            hint="check lora_alpha and the weights, or use a wider dtype with --dtype f32",
        )
    return stored


def error_with_rounding(error: float, rounding: float) -> float:
    """Return the relative error of a delta that was truncated, and then rounded.

    Parameters
    ----------
    error : float
        ‖D − T‖ / ‖D‖ of the best approximation T, which is orthogonal to what it leaves.
    rounding : float
        ‖T − T'‖ / ‖T‖ of the factors' rounding, which has no direction of its own.

    Examples
    --------
    >>> error_with_rounding(0.0, 0.25), error_with_rounding(0.6, 0.0)
    (0.25, 0.6)
    """
    return float((error**2 + (1 - error**2) * rounding**2) ** 0.5)


def compute_factors(adapter: Adapter, rounding: Mapping[str, float]) -> None:
    """Compute factors of `lazy_delta` that were not written, so that their rounding error is known.

    ``rounding`` is what they have been measured to be so far, by target.
    """
    for target, delta in adapter.deltas.items():
        if target not in rounding:
            delta.b.load()
            delta.b.release()


def lazy_delta(
    source: LoraDelta,
    rank: int,
    dtype: str,
    compute: Callable[[], Pair],
    memo: SingleEntryCache,
    rounding: dict[str, float],
) -> LoraDelta:
    """Return a delta of another rank, scaling folded in, factors computed when loaded.

    Parameters
    ----------
    source : LoraDelta
        Gives names, dimensions and whatever else belongs to the module.
    rank : int
    dtype : str
        safetensors name.
    compute : callable
        Returns B and A in any float dtype.
    memo : SingleEntryCache
        Shared by all modules of an adapter.
    rounding : dict of str to float
        Takes, by target, the relative error of the product that rounding to `dtype` makes, once
        the factors are computed.
    """

    def stored() -> Pair:
        exact = compute()
        rounding[source.target] = lora.rounding_error(*exact, numpy_dtype(dtype))
        return rounded(exact[0], dtype, source.b.name), rounded(exact[1], dtype, source.a.name)

    def loader(which: int) -> Callable[[], memoryview]:
        def load() -> memoryview:
            pair = memo.get((id(source), rank, dtype), stored)
            assert isinstance(pair, tuple)
            return array_bytes(pair[which])

        return load

    def shaped(tensor: DenseTensor, shape: tuple[int, ...], which: int) -> DenseTensor:
        return DenseTensor(tensor.name, dtype, shape, loader(which))

    experts = source.a.shape[:-2]
    return replace(
        source,
        a=shaped(source.a, (*experts, rank, source.in_features), 1),
        b=shaped(source.b, (*experts, source.out_features, rank), 0),
        scaling=1.0,
        alpha=float(rank),
    )
