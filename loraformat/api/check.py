"""``loraformat.check`` and ``loraformat.fix``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.api.arguments import many
from loraformat.api.chat_templates import format_of

if TYPE_CHECKING:
    from loraformat.ops.check.check import CheckReport
    from loraformat.ops.convert.adapter import AdapterConversion

__all__ = ["check", "fix"]


def check(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    runtime: str | Sequence[str] = (),
    write: str | Path | None = None,
    allow_pickle: bool = False,
) -> CheckReport:
    """Check how inference runtimes load an adapter.

    Parameters
    ----------
    adapter : str or Path
        A PEFT directory, a GGUF file, ``BUNDLE/adapters/NAME``, or a Hub id.
    base : str or Path, optional
        Compare names, shapes, architecture and fingerprint with this base. An adapter in a bundle
        is compared with that bundle.
    runtime : str or sequence of str
        ``transformers``, ``vllm``, ``sglang``, ``lorax``, ``llama.cpp``, ``ollama`` or ``mlx``;
        all by default.
    write : str or Path, optional
        Write a Modelfile, command lines and a script that load this adapter into this new
        directory.
    allow_pickle : bool
        Also read pickled ``.bin`` files, with a loader restricted to tensors.

    Returns
    -------
    CheckReport

    Raises
    ------
    UsageError
        If there is no such runtime.
    InputError
        If the adapter is damaged.
    """
    from loraformat.ops.check.check import check as run
    from loraformat.ops.check.write import write_usage

    report = run(adapter, base=base, runtimes=many(runtime), allow_pickle=allow_pickle)
    if write is None:
        return report
    known = None if base is None else str(base)
    return replace(report, written=write_usage(report, write, base=known, format_of=format_of))


def fix(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
) -> AdapterConversion:
    """Write an adapter in the form that every runtime interprets the same way.

    The scaling is folded into B, alpha equals the rank, and all modules have one rank.

    Parameters
    ----------
    adapter : str or Path
        A PEFT directory, a GGUF file, ``BUNDLE/adapters/NAME``, or a Hub id.
    output : str or Path
        A PEFT directory, or ``BUNDLE/adapters/NAME``.
    base : str or Path, optional
        Base to compare names and shapes with.
    dtype : str, optional
        ``f32``, ``f16`` or ``bf16`` for the factors; unchanged if that is lossless.
    force : bool
        Replace an existing output.
    dry_run : bool
        Write nothing; report what would be written.
    allow_pickle : bool
        Also read pickled ``.bin`` files, with a loader restricted to tensors.

    Returns
    -------
    AdapterConversion

    Raises
    ------
    UnsupportedError
        If it is more than low-rank deltas; merge it instead.
    """
    from loraformat.ops.check.fix import fix as run

    return run(
        adapter, output, base=base, dtype=dtype, allow_pickle=allow_pickle, force=force,
        dry_run=dry_run,
    )  # fmt: skip
