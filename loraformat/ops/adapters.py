"""Opening and writing adapters, whatever their format."""

from __future__ import annotations

from pathlib import Path

from loraformat import plugins
from loraformat.adapter import Adapter
from loraformat.checkpoint import Checkpoint
from loraformat.dtypes import parse_weight_dtype
from loraformat.errors import UnsupportedError
from loraformat.hub import resolve
from loraformat.plugins import AdapterReadOptions, AdapterWriteOptions
from loraformat.publish import Publication

__all__ = ["open_adapter", "write_adapter"]


def open_adapter(
    source: str | Path, *, base: Checkpoint | None = None, allow_pickle: bool = False
) -> Adapter:
    """Open an adapter.

    Parameters
    ----------
    source : str or Path
        A local path, ``BUNDLE/adapters/NAME`` too, or a Hub id.
    base : Checkpoint, optional
        The base it will be applied to: names and orientation are held against it.
    allow_pickle : bool
        Read a pickled file, too, with a loader that makes nothing but tensors.

    Raises
    ------
    LoraFormatError
        If it is no adapter, damaged, or more than a low-rank delta.
    """
    path = resolve(source).path
    converter = plugins.sniff(path)
    if converter.read_adapter is None:
        raise UnsupportedError(
            f"is a {converter.kind} ({converter.name}), not an adapter", path=path
        )
    return converter.read_adapter(path, AdapterReadOptions(base, allow_pickle))


def write_adapter(
    adapter: Adapter, target: Path, *, force: bool = False, dtype: str | None = None
) -> None:
    """Write an adapter as a PEFT directory: whole or not at all.

    Parameters
    ----------
    adapter : Adapter
    target : Path
    force : bool
        Replace an adapter that stands there.
    dtype : str, optional
        ``f32`` (default), ``f16`` or ``bf16``.
    """
    converter = plugins.get("peft")
    assert converter.write_adapter is not None
    inputs = [adapter.path, *adapter.sources]
    with Publication(target, plan="adapter", inputs=inputs, force=force) as output:
        options = AdapterWriteOptions(parse_weight_dtype(dtype or "f32"))
        converter.write_adapter(adapter, output, options)
        output.commit()
