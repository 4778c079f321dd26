"""The portable form of an adapter."""

from __future__ import annotations

from pathlib import Path

from loraformat import plugins
from loraformat.errors import UnsupportedError, UsageError
from loraformat.hub import resolve
from loraformat.ops.convert.adapter import AdapterConversion, convert_adapter
from loraformat.plugins import AdapterFormat

__all__ = ["fix"]


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

    The scaling is folded into B, alpha equals the rank and is an integer, all modules have one
    rank (zeros change no product), there are no patterns and no rsLoRA, names are PEFT's. With
    the weights of its base, a type of module that some layers adapt gets zeros in the others.
    Folding is done in float64 and rounded once to B's dtype, or to float32 where its own has 16
    bits and would lose some: a delta differs from the original by at most that rounding.

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
        If it is more than low-rank deltas (DoRA, biases, replaced modules or rows, aLoRA); merge
        it instead.
    LoraFormatError
        Nothing appears at the output then.
    """
    target = Path(output)
    if target.suffix in (".gguf", ".safetensors"):
        raise UsageError(
            f"-o {target}: --fix writes a PEFT directory",
            hint="use a directory, and convert that to GGUF",
        )
    found = resolve(adapter, pickles=allow_pickle)
    reader = plugins.sniff(found.path, AdapterFormat)
    if not isinstance(reader, AdapterFormat):
        raise UnsupportedError(f"is a model ({reader.name}), not an adapter", path=found.path)
    return convert_adapter(
        found,
        reader,
        target,
        to_format="peft",
        dtype=dtype,
        base=base,
        canonical=True,
        one_rank=True,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
    )
