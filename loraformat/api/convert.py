"""``loraformat.convert``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.api.arguments import byte_count, many
from loraformat.api.progress import Progress, reported

if TYPE_CHECKING:
    from loraformat.ops.convert.report import ConversionReport

__all__ = ["convert"]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    from_: str | None = None,
    to: str | None = None,
    dtype: str | None = None,
    config: str | Path | None = None,
    pre: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    skip: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    max_shard_size: int | str | None = None,
    base: str | Path | None = None,
    canonical: bool = False,
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    force: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
    from_format: str | None = None,
    to_format: str | None = None,
) -> ConversionReport:
    """Convert a model or an adapter to another format.

    Parameters
    ----------
    source : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.
    target : str or Path
        The output. An adapter's may be ``BUNDLE/adapters/NAME``.
    from_, to : str, optional
        Formats of source and target. By default the source's is detected, and the target's
        follows from its suffix: else a bundle, or a PEFT directory for an adapter.
    dtype : str, optional
        Of dense tensors or of an adapter's factors: ``f32``, ``f16``, ``bf16``, and GGUF's block
        types for GGUF outputs. Unchanged by default; ``f16`` for a GGUF output.
    config : str or Path, optional
        ``config.json`` of the model in a GGUF file; inferred by default.
    pre : str, optional
        llama.cpp's name of the pre-tokenizer, for a GGUF output; detected by default.
    block_size : int, optional
        Elements per absmax scale: a power of two from 32 to 4096; 64 by default.
    double_quant : bool, optional
        Quantize the absmax scales, too; true by default.
    skip, include : str or sequence of str
        Globs of weights not to quantize, and of weights to quantize as well.
    max_shard_size : int or str, optional
        Maximum tensor bytes per file, a number or a text such as ``500MB``; 2 GB by default.
    base : str or Path, optional
        For adapters: base to compare names and shapes with.
    canonical : bool
        For adapters: convert to canonical form instead of copying.
    allow_pickle : bool
        Also read pickled ``.bin`` files, with a loader restricted to tensors.
    allow_base_mismatch : bool
        For adapters: accept one made for another base; the output records this base.
    force : bool
        Replace an existing target.
    strict : bool
        Fail if the target cannot hold everything in the source.
    dry_run : bool
        Write nothing; report what would be written.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes done and in total.
    from_format, to_format : str, optional
        Former names of ``from_`` and ``to``.

    Returns
    -------
    ConversionReport
        A `ModelConversion` or an `AdapterConversion`.

    Raises
    ------
    LoraFormatError
        The target is untouched then.
    """
    from loraformat.ops.convert.convert import convert as run

    with reported(progress, "convert") as told:
        return run(
            source, target, from_format=from_ or from_format, to_format=to or to_format,
            dtype=dtype, config=config,
            pre_tokenizer=pre, block_size=block_size, double_quant=double_quant,
            skip=many(skip), include=many(include),
            shard_limit=byte_count(max_shard_size, "max-shard-size"), base=base,
            canonical=canonical, allow_pickle=allow_pickle,
            allow_base_mismatch=allow_base_mismatch, force=force, strict=strict, dry_run=dry_run,
            progress=told,
        )  # fmt: skip
