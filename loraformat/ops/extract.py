"""Extraction: the adapter that leads from a base to its fine-tune.

Each changed matrix becomes a low-rank delta, found by block Krylov iteration on the
difference, which only exists in row tiles; each changed vector (norms, biases) and each
grown vocabulary is replaced as a whole; what is neither is listed.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from loraformat import config_json, plugins
from loraformat.adapter import Adapter, LoraDelta
from loraformat.architecture import is_conv1d
from loraformat.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.dtypes import WEIGHT_DTYPES, parse_weight_dtype, torch_dtype
from loraformat.errors import InputError, UnsupportedError, UsageError, printable
from loraformat.hub import resolve
from loraformat.ops.factors import Pair, as_bytes
from loraformat.ranks import noise_edge, rounding_noise
from loraformat.subspace import Approximation, block_krylov

__all__ = [
    "ExtractOptions",
    "ExtractedModule",
    "ExtractionReport",
    "extract",
    "extract_adapter",
]

_FLOATS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
_TILE_ELEMENTS = 1 << 22
_HELD_BYTES = 256 << 20  # a difference up to this size is computed once
_FIRST_BLOCK = 32
_NF4_ERROR = 0.092  # ‖W − NF4(W)‖ / ‖W‖ of ordinary weights, where none is recorded
_EMBEDDING = re.compile(r"(^|\.)(?!embed_out$)(\w*embed\w*|wte|wpe)$")
#: Experts in one parameter of shape (experts, in, out); others are (experts, out, in).
_TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text"}
_Orientation = Literal["linear", "transposed"]


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What to extract.

    Attributes
    ----------
    rank : int, "auto" or None
        ``"auto"``: as many parts as stand out of the rounding noise of the checkpoint.
    energy : float or None
        Instead of a rank: the share of each difference's squared norm to capture.
    max_rank : int
        For ``"auto"`` and `energy`.
    skip : sequence of str
        Names (globs) to leave alone.
    dtype : str or None
        Of the factors; by default the fine-tune's own.
    seed : int
        Of the random start.
    """

    rank: int | Literal["auto"] | None = None
    energy: float | None = None
    max_rank: int = 256
    skip: Sequence[str] = ()
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("extract wants a rank, or an energy")
        if self.rank != "auto" and self.rank is not None and self.rank < 1:
            raise UsageError("rank is at least 1, or auto")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a share above 0 and up to 1, not {self.energy}")
        if self.max_rank < 1:
            raise UsageError("max-rank is at least 1")


@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """One changed matrix.

    Attributes
    ----------
    target : str
    rank : int
        0: nothing in the difference stands out of the noise, and it is left out.
    captured : float
        Share of the difference's squared norm in the delta: measured, not estimated.
    error : float
        √(1 − captured).
    norm : float
        ‖D‖ of the difference.
    noise : float or None
        Where the noise edge is, in units of singular values, for rank ``"auto"``.
    capped : bool
        More parts were wanted than the largest rank allows.
    """

    target: str
    rank: int
    captured: float
    error: float
    norm: float
    noise: float | None = None
    capped: bool = False


@dataclass(frozen=True, slots=True)
class ExtractionReport:
    """What an extraction found.

    Attributes
    ----------
    base, tuned, target : str
    modules : list of ExtractedModule
    replaced : list of str
        Tensors that the adapter replaces as a whole: norms, biases, grown vocabularies.
    unchanged : int
    left_out : dict of str to str
        Changes that the adapter does not hold, by name, with the reason.
    parameters : int
        Elements of A and B.
    captured : float
        Share of the squared norm of all matrices' differences.
    notes : list of str
    seconds : float
    """

    base: str
    tuned: str
    target: str
    modules: list[ExtractedModule]
    replaced: list[str]
    unchanged: int
    left_out: dict[str, str]
    parameters: int
    captured: float
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return asdict(self)


def extract(
    base: str | Path,
    tuned: str | Path,
    target: str | Path,
    options: ExtractOptions,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractionReport:
    """Extract an adapter from a base and its fine-tune, and write it.

    Parameters
    ----------
    base, tuned : str or Path
        Models in any format, or Hub ids. NF4 weights are dequantized.
    target : str or Path
        A PEFT directory; it must not exist, unless ``force``.
    options : ExtractOptions
    force : bool
    progress : callable
        Called with bytes done and in total.

    Returns
    -------
    ExtractionReport
    """
    from loraformat.ops.adapters import write_adapter

    began = time.perf_counter()
    with _open(base) as one, _open(tuned) as other:
        adapter, report = extract_adapter(one, other, options, progress=progress)
        with adapter:
            write_adapter(replace(adapter, base_model=str(base)), Path(target), force=force)
    return replace(
        report,
        base=str(base),
        tuned=str(tuned),
        target=str(target),
        seconds=time.perf_counter() - began,
    )


def _open(source: str | Path) -> Checkpoint:
    path = resolve(source).path
    converter = plugins.sniff(path)
    if converter.kind != "base" or converter.read is None:
        raise UnsupportedError("is not a model", path=path, hint="extract wants two whole models")
    return converter.read(path)


def _model_type(model: Checkpoint) -> str | None:
    if model.config is None:
        return None
    found = config_json.parse(model.config, model.path).get("model_type")
    return found if isinstance(found, str) else None


class _Spool:
    """Factors on their way to the writer: in an unnamed file, not in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the adapter

    def put(self, name: str, tensor: torch.Tensor, dtype: str) -> DenseTensor:
        data = tensor.to(torch_dtype(dtype)).contiguous()
        start = self._file.seek(0, os.SEEK_END)
        nbytes = self._file.write(as_bytes(data))
        self._file.flush()
        shape = tuple(data.shape)

        def load() -> memoryview:
            self._file.seek(start)
            return memoryview(self._file.read(nbytes))

        return DenseTensor(name, dtype, shape, load)

    def close(self) -> None:
        self._file.close()


def extract_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    options: ExtractOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Adapter, ExtractionReport]:
    """Return the adapter between two open models, and what it captures.

    Parameters
    ----------
    base, tuned : Checkpoint
        They must stay open until the adapter is written.
    options : ExtractOptions
    progress : callable

    Returns
    -------
    Adapter
        To be closed; its factors are in a temporary file.
    ExtractionReport

    Raises
    ------
    InputError
        If the models have nothing in common, or hold NaN.
    """
    if not set(base.tensors) & set(tuned.tensors):
        raise InputError(
            f"has no tensor in common with {printable(base.path)}",
            path=tuned.path,
            hint="extract wants a base and its own fine-tune",
        )
    work = _Extraction(options, _model_type(tuned))
    total = sum(tensor.nbytes for tensor in tuned.tensors.values())
    done = 0
    try:
        for name, tensor in tuned.tensors.items():
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in options.skip):
                work.add(base.tensors.get(name), tensor)
            done += tensor.nbytes
            progress(done, total)
    except BaseException:
        work.spool.close()
        raise
    for name in base.tensors.keys() - tuned.tensors.keys():
        work.left_out[name] = "is only in the base"
    return work.adapter(base, tuned), work.report(base, tuned)


class _Extraction:
    def __init__(self, options: ExtractOptions, model_type: str | None) -> None:
        self.options, self.model_type = options, model_type
        self.spool = _Spool()
        self.deltas: dict[str, LoraDelta] = {}
        self.replacements: dict[str, DenseTensor] = {}
        self.modules: list[ExtractedModule] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.unchanged = 0

    def add(self, base: LazyTensor | None, tuned: LazyTensor) -> None:
        """Compare one tensor with its base."""
        name = tuned.name
        if base is None:
            self.left_out[name] = "is only in the fine-tune"
        elif base.shape != tuned.shape:
            self._reshaped(base, tuned)
        elif base.dtype not in _FLOATS or tuned.dtype not in _FLOATS:
            if _raw(base) == _raw(tuned):
                self.unchanged += 1
            else:
                self.left_out[name] = f"changed, and is not of real numbers ({tuned.dtype})"
        elif (len(tuned.shape) == 2 and name.endswith(".weight")) or len(tuned.shape) == 3:
            self._low_rank(base, tuned)
        else:
            self._replace(base, tuned)
        for tensor in (base, tuned):
            if tensor is not None:
                tensor.release()

    def _reshaped(self, base: LazyTensor, tuned: LazyTensor) -> None:
        grown = len(base.shape) == len(tuned.shape) == 2 and base.shape[1] == tuned.shape[1]
        if grown and base.shape[0] < tuned.shape[0] and isinstance(tuned, DenseTensor):
            self.replacements[tuned.name] = tuned
            self.notes.append(
                f"{tuned.name} grew from {base.shape[0]} to {tuned.shape[0]} rows and is replaced "
                "as a whole: resize the base's vocabulary before loading the adapter"
            )
        else:
            sizes = "x".join(map(str, base.shape)), "x".join(map(str, tuned.shape))
            self.left_out[tuned.name] = f"changed its shape from {sizes[0]} to {sizes[1]}"

    def _replace(self, base: LazyTensor, tuned: LazyTensor) -> None:
        one, other = _values(base).flatten(), _values(tuned).flatten()
        if torch.equal(one.double(), other.double()):
            self.unchanged += 1
        elif len(tuned.shape) > 2 or not isinstance(tuned, DenseTensor):
            self.left_out[tuned.name] = "changed, and is neither a matrix nor a vector"
        else:
            _Difference(tuned.name, one[None], other[None]).check()
            self.replacements[tuned.name] = tuned

    def _low_rank(self, base: LazyTensor, tuned: LazyTensor) -> None:
        parts = [_Fit(d, self.options) for d in _differences(base, tuned)]
        total = sum(part.found.squared_norm for part in parts)
        if not total:
            self.unchanged += 1
            return
        rank = max(part.rank for part in parts)
        kept = sum(part.kept for part in parts)
        captured = min(kept / total, 1.0)
        edges = [part.edge for part in parts if part.edge is not None]
        self.modules.append(
            ExtractedModule(
                tuned.name, rank, captured, (1 - captured) ** 0.5, total**0.5,
                max(edges) if edges else None, any(part.capped for part in parts),
            )
        )  # fmt: skip
        if rank:
            self.deltas[tuned.name] = self._delta(tuned, [p.factors(rank) for p in parts], rank)

    def _delta(self, tuned: LazyTensor, pairs: list[Pair], rank: int) -> LoraDelta:
        orientation = self._orientation(tuned)
        if orientation == "transposed":  # the tensor is Dᵀ = (B A)ᵀ
            pairs = [(a.T, b.T) for b, a in pairs]
        b, a = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
        if len(tuned.shape) == 2:
            b, a = b[0], a[0]
        own = tuned.dtype if tuned.dtype in WEIGHT_DTYPES.values() else "F32"
        dtype = parse_weight_dtype(self.options.dtype) if self.options.dtype else own
        module = tuned.name.removesuffix(".weight")
        return LoraDelta(
            tuned.name,
            self.spool.put(f"{module}.lora_A.weight", a, dtype),
            self.spool.put(f"{module}.lora_B.weight", b, dtype),
            1.0,
            orientation,
            alpha=float(rank),
        )

    def _orientation(self, tensor: LazyTensor) -> _Orientation:
        if len(tensor.shape) == 3:
            turned = self.model_type in _TRANSPOSED_EXPERTS
        else:
            embedding = _EMBEDDING.search(tensor.name.removesuffix(".weight"))
            turned = bool(embedding) or is_conv1d(tensor.name, self.model_type)
        return "transposed" if turned else "linear"

    def adapter(self, base: Checkpoint, tuned: Checkpoint) -> Adapter:
        """Return what was found."""
        if not self.deltas and not self.replacements:
            self.spool.close()
            raise InputError(
                f"does not differ from {printable(base.path)} in anything an adapter can hold",
                path=tuned.path,
            )
        return Adapter(
            path=tuned.path,
            format="extracted",
            deltas=self.deltas,
            replacements=self.replacements,
            base_model=base.provenance.repo or str(base.path),
            sources=(*base.sources, *tuned.sources),
            notes=tuple(self.notes),
            close=self.spool.close,
        )

    def report(self, base: Checkpoint, tuned: Checkpoint) -> ExtractionReport:
        """Return what is to be said."""
        total = sum(module.norm**2 for module in self.modules)
        kept = sum(module.norm**2 * module.captured for module in self.modules)
        return ExtractionReport(
            base=str(base.path),
            tuned=str(tuned.path),
            target="",
            modules=self.modules,
            replaced=sorted(self.replacements),
            unchanged=self.unchanged,
            left_out=dict(sorted(self.left_out.items())),
            parameters=sum(delta.parameters for delta in self.deltas.values()),
            captured=kept / total if total else 1.0,
            notes=[*self.notes, *self._remarks()],
        )

    def _remarks(self) -> Iterator[str]:
        if capped := sum(module.capped for module in self.modules):
            yield f"{capped} modules wanted more than rank {self.options.max_rank} (--max-rank)"
        if silent := sum(not module.rank for module in self.modules):
            yield f"{silent} modules changed by rounding noise only and are left out"
        if experts := sum(".experts." in target for target in self.deltas):
            yield (
                f"{experts} deltas are of experts, under the names in the checkpoint; "
                "transformers fuses experts in memory, and PEFT may not find these"
            )


def _raw(tensor: LazyTensor) -> object:
    loaded = tensor.load()
    return loaded if isinstance(loaded, memoryview) else loaded.by_suffix()


def _values(tensor: LazyTensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, NF4Tensor) else tensor.torch()


def _differences(base: LazyTensor, tuned: LazyTensor) -> Iterator[_Difference]:
    one, other = _values(base), _values(tuned)
    noise = _quantization_noise(base, one)
    if len(tuned.shape) == 2:
        yield _Difference(tuned.name, one, other, _FLOATS[tuned.dtype], noise)
        return
    for expert in range(len(other)):
        yield _Difference(tuned.name, one[expert], other[expert], _FLOATS[tuned.dtype], noise)


def _quantization_noise(base: LazyTensor, values: torch.Tensor) -> float:
    """Return the variance of an NF4 base's own error."""
    if not isinstance(base, NF4Tensor) or not base.count:
        return 0.0
    error = base.load().relative_rms_error
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float32))
    return (norm * (_NF4_ERROR if error is None else error)) ** 2 / base.count


class _Difference:
    """Tuned minus base in float32, row tile by row tile."""

    def __init__(
        self,
        name: str,
        base: torch.Tensor,
        tuned: torch.Tensor,
        precision: int = 24,
        variance: float = 0.0,
    ) -> None:
        self.name, self.base, self.tuned = name, base, tuned
        self.precision, self.variance = precision, variance
        self.shape = (tuned.shape[0], tuned.shape[1])
        self._held: list[tuple[int, torch.Tensor]] | None = None

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, tile); small differences are kept for the next pass."""
        if self._held is not None:
            yield from self._held
            return
        held: list[tuple[int, torch.Tensor]] = []
        holds = 4 * self.tuned.numel() <= _HELD_BYTES
        for first, base, tuned in self._rows():
            tile = tuned.float() - base.float()
            if not math.isfinite(float(tile.sum())):
                self._complain()
            if holds:
                held.append((first, tile))
            yield first, tile
        self._held = held if holds else None

    def _rows(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        height = max(1, _TILE_ELEMENTS // max(self.shape[1], 1))
        for first in range(0, self.shape[0], height):
            yield first, self.base[first : first + height], self.tuned[first : first + height]

    def check(self) -> None:
        """Raise `InputError` if a value is not finite."""
        for _ in self.tiles():
            pass

    def _complain(self) -> None:
        raise InputError(
            f"the difference of {printable(self.name)} is not finite: one of the models holds NaN "
            "or infinity there, or values too large to subtract",
            hint="repair the checkpoint, or leave this tensor out with --skip",
        )

    def noise_edge(self) -> float:
        """Return the singular value below which the difference is rounding."""
        total = 0.0
        for _, _, tuned in self._rows():
            exponents = torch.frexp(tuned.float()).exponent.double()
            # A zero has no step of its own.
            steps = torch.where(tuned != 0, torch.exp2(exponents - self.precision), 0.0)
            total += float(steps.square().sum())
        sigma = rounding_noise(total / self.tuned.numel())
        return noise_edge(math.sqrt(sigma**2 + self.variance), *self.shape)


class _Fit:
    """The approximation of one difference at the rank that the options ask for."""

    def __init__(self, difference: _Difference, options: ExtractOptions) -> None:
        self.edge = difference.noise_edge() if options.rank == "auto" else None
        most = min(difference.shape)
        fixed = isinstance(options.rank, int)
        limit = min(int(options.rank) if fixed and options.rank else options.max_rank, most)
        block = limit if fixed else min(_FIRST_BLOCK, limit)
        while True:
            self.found = block_krylov(difference.tiles, difference.shape, block, seed=options.seed)
            wanted = limit if fixed else self._wanted(options)
            if wanted < block or block == limit:
                break
            block = min(2 * block, limit)
        self.rank = min(wanted, limit) if self.found.squared_norm else 0
        self.capped = not fixed and wanted > limit and limit < most
        self.kept = float(self.found.values[: self.rank].square().sum())
        self.found = self._trimmed(self.found)

    def _wanted(self, options: ExtractOptions) -> int:
        values = self.found.values
        if self.edge is not None:
            return int((values > self.edge).sum())
        assert options.energy is not None
        # float32's rounding of the certificate must not send an exact fit looking for more.
        goal = options.energy * self.found.squared_norm * (1 - 1e-6)
        return int((values.square().cumsum(0) < goal).sum()) + 1 if goal else 0

    def _trimmed(self, found: Approximation) -> Approximation:
        k = self.rank
        return Approximation(
            found.left[:, :k].clone(),
            found.values[:k],
            found.right[:k].clone(),
            found.squared_norm,
        )

    def factors(self, rank: int) -> Pair:
        """Return B and A, with zeros up to a rank that another expert needs."""
        b, a = self.found.factors(self.rank)
        more = rank - self.rank
        return torch.nn.functional.pad(b, (0, more)), torch.nn.functional.pad(a, (0, 0, 0, more))
