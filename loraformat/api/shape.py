"""``loraformat.reduce``, ``combine``, ``extract`` and ``spectrum``: ranks of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loraformat.api.arguments import many
from loraformat.api.progress import Progress, reported

if TYPE_CHECKING:
    from loraformat.ops.combine.options import Method
    from loraformat.ops.combine.report import CombinationReport
    from loraformat.ops.extract.report import ExtractionReport
    from loraformat.ops.reduce import ReductionReport
    from loraformat.ops.spectrum.spectrum import SpectrumReport

__all__ = ["combine", "extract", "reduce", "spectrum"]


def reduce(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    statistics: bool = True,
    dtype: str | None = None,
    base: str | Path | None = None,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> ReductionReport:
    """Reduce an adapter's rank with the smallest possible error.

    One of `rank`, `energy` and `budget`, or `max_rank` alone, says how far.

    Parameters
    ----------
    adapter : str or Path
        In any format, or a Hub id.
    output : str or Path
        A PEFT directory, ``NAME.gguf`` or ``BUNDLE/adapters/NAME``.
    rank : int, optional
        Of every module.
    energy : float, optional
        Fraction of each module's squared norm to keep.
    budget : int, optional
        Total number of parameters, distributed over the modules where they retain most.
    max_rank : int, optional
        Upper bound per module; alone, or with `energy` or `budget`.
    statistics : bool
        Minimise the error of the outputs if the adapter has activation statistics; otherwise that
        of the weights.
    dtype : str, optional
        Of the new factors; unchanged by default.
    base : str or Path, optional
        Base to compare names and shapes with; a GGUF adapter needs its ``config.json``.
    allow_base_mismatch : bool
        Accept an adapter that was made for another base.
    allow_pickle, force, dry_run, progress
        As in `convert`.

    Returns
    -------
    ReductionReport
    """
    from loraformat.ops.reduce import Reduction
    from loraformat.ops.reduce import reduce as run

    reduction = Reduction(rank, energy, budget, max_rank, statistics, dtype)
    with reported(progress, "reduce") as told:
        return run(
            adapter, output, reduction, base=base, allow_pickle=allow_pickle,
            allow_base_mismatch=allow_base_mismatch, force=force, dry_run=dry_run, progress=told,
        )  # fmt: skip


def combine(
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    method: Method = "svd",
    weight: float | Sequence[float] = (),
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    dtype: str | None = None,
    base: str | Path | None = None,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> CombinationReport:
    """Combine several adapters into one.

    Parameters
    ----------
    adapters : str, Path or a sequence of them
        In any format, or Hub ids.
    output : str or Path
        A PEFT directory, ``NAME.gguf`` or ``BUNDLE/adapters/NAME``.
    method : str
        ``svd``: best rank-r approximation of the weighted sum. ``cat``: exact sum, ranks added.
        ``linear``: exact sum at the smallest sufficient rank. ``ties``, ``dare_linear``,
        ``dare_ties`` and ``magnitude_prune`` prune or drop elements first.
    weight : float or sequence of float
        Weight of each adapter, in the same order; may be negative; 1 by default.
    rank : int, optional
        Of the result; by default the largest input rank, per module.
    density : float
        Fraction of elements kept by pruning or dropping.
    seed : int
        Random seed for dropping.
    dtype, base, allow_base_mismatch, allow_pickle, force, dry_run, progress
        As in `reduce`; progress counts modules.

    Returns
    -------
    CombinationReport
    """
    from loraformat.ops.combine.combine import combine as run
    from loraformat.ops.combine.options import CombineOptions

    options = CombineOptions(method, rank, density, seed, dtype)
    with reported(progress, "combine", "module") as told:
        return run(
            many(adapters), output, options, weights=many(weight) or None, base=base,
            allow_pickle=allow_pickle, allow_base_mismatch=allow_base_mismatch, force=force,
            dry_run=dry_run, progress=told,
        )  # fmt: skip


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    max_rank: int = 256,
    skip: str | Sequence[str] = (),
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> ExtractionReport:
    """Extract an adapter from a base and its fine-tune.

    Parameters
    ----------
    base, tuned : str or Path
        Models in any format, or Hub ids.
    output : str or Path
        A PEFT directory, ``NAME.gguf`` or ``BUNDLE/adapters/NAME``.
    rank : int or "auto", optional
        Of every module that differs by more than rounding noise; ``"auto"``, the default without
        an energy, picks the rank at which rounding noise of `tuned` begins.
    energy : float, optional
        Capture this fraction of each difference's squared norm.
    max_rank : int
        Upper bound for ``rank="auto"`` and `energy`.
    skip : str or sequence of str
        Globs of tensors to leave out.
    dtype : str, optional
        Of the factors; that of `tuned` by default.
    allow_base_mismatch : bool
        Allow an output bundle other than `base`.
    force, dry_run, progress
        As in `convert`.

    Returns
    -------
    ExtractionReport
    """
    from loraformat.ops.extract.extract import extract as run
    from loraformat.ops.extract.options import ExtractOptions

    options = ExtractOptions(rank, energy, max_rank, many(skip), dtype)
    with reported(progress, "extract") as told:
        return run(
            base, tuned, output, options, allow_base_mismatch=allow_base_mismatch, force=force,
            dry_run=dry_run, progress=told,
        )  # fmt: skip


def spectrum(
    adapter: str | Path, *, allow_pickle: bool = False, progress: Progress = False
) -> SpectrumReport:
    """Compute the singular value spectrum and effective ranks of an adapter.

    Parameters
    ----------
    adapter : str or Path
        In any format, or a Hub id.
    allow_pickle, progress
        As in `convert`.

    Returns
    -------
    SpectrumReport
    """
    from loraformat.ops.spectrum.spectrum import spectrum as run

    with reported(progress, "spectrum") as told:
        return run(adapter, allow_pickle=allow_pickle, progress=told)
