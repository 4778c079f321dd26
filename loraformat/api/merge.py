"""``loraformat.merge`` and ``loraformat.unmerge``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.api.arguments import byte_count, many
from loraformat.api.progress import Progress, reported

if TYPE_CHECKING:
    from loraformat.model.adapter import Adapter
    from loraformat.ops.merge.report import MergeReport
    from loraformat.ops.unmerge.report import UnmergeReport

__all__ = ["merge", "unmerge"]


def merge(
    base: str | Path,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    weight: float | Sequence[float] = (),
    from_: str | None = None,
    to: str | None = None,
    dtype: str | None = None,
    undo: str | Path | None = None,
    requantize: bool = False,
    name: str | None = None,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    config: str | Path | None = None,
    pre: str | None = None,
    max_shard_size: int | str = "2GB",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> MergeReport:
    """Merge adapters into a base and write a new model.

    Parameters
    ----------
    base : str or Path
        A local path, or ``org/name[@revision]`` on the Hub, in any format. It is never modified.
    adapters : str, Path, Adapter or a sequence of them
        An open `Adapter` stays open.
    output : str or Path
    weight : float or sequence of float
        Weight of each adapter, in the same order; 1 by default.
    from_, to : str, optional
        Formats of base and output; the output's is dense safetensors by default.
    dtype : str, optional
        Of the output. By default unchanged; NF4 becomes bf16, GGUF block types f32.
    undo : str or Path, optional
        Write an undo record, from which `unmerge` restores the base exactly.
    requantize : bool
        Quantize the merged weights to NF4. For a base that was already NF4 this loses nearly all
        of the delta.
    name : str, optional
        With ``to="loraformat"``: name of the adapter in the bundle.
    allow_base_mismatch : bool
        Accept an adapter that was made for another base.
    allow_pickle, config, pre, max_shard_size
        As in `convert`.
    force : bool
        Replace an existing model at the output.
    dry_run, progress
        As in `convert`.

    Returns
    -------
    MergeReport

    Raises
    ------
    LoraFormatError
        Nothing appears at the output then.
    """
    from loraformat.ops.merge.merge import merge as run

    limit = byte_count(max_shard_size, "max-shard-size")
    assert limit is not None
    with reported(progress, "merge") as told:
        return run(
            base, many(adapters), output, weights=many(weight), from_format=from_, to_format=to,
            dtype=dtype, undo=undo, requantize=requantize, name=name,
            allow_base_mismatch=allow_base_mismatch, allow_pickle=allow_pickle,
            pre_tokenizer=pre, config=config, shard_limit=limit, force=force, dry_run=dry_run,
            progress=told,
        )  # fmt: skip


def unmerge(
    merged: str | Path,
    output: str | Path,
    *,
    undo: str | Path | None = None,
    adapter: str | Path | Adapter | Sequence[str | Path | Adapter] = (),
    weight: float | Sequence[float] = (),
    allow_pickle: bool = False,
    to: str | None = None,
    max_shard_size: int | str = "2GB",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> UnmergeReport:
    """Undo a merge and restore the base.

    Parameters
    ----------
    merged : str or Path
        What `merge` wrote. Undo several merges in reverse order.
    output : str or Path
    undo : str or Path, optional
        The merge's undo record: the base is restored bit for bit. Without one the adapters are
        subtracted, which is only approximate.
    adapter : str, Path, Adapter or a sequence of them
        With a record: current location of the merged adapters. Without: adapters to subtract.
    weight : float or sequence of float
        Without a record: weight of each adapter; 1 by default.
    to : str, optional
        Format of the output; dense safetensors by default.
    allow_pickle, max_shard_size, force, dry_run, progress
        As in `merge`.

    Returns
    -------
    UnmergeReport

    Raises
    ------
    FormatError
        If record, model and adapters do not belong together.
    """
    from loraformat.ops.unmerge.unmerge import unmerge as run

    limit = byte_count(max_shard_size, "max-shard-size")
    assert limit is not None
    with reported(progress, "unmerge") as told:
        return run(
            merged, output, undo=undo, adapters=many(adapter), weights=many(weight),
            allow_pickle=allow_pickle, to_format=to, shard_limit=limit, force=force,
            dry_run=dry_run, progress=told,
        )  # fmt: skip
