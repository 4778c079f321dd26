"""Functions that only read: ``info``, ``verify``, ``formats``, ``open_model`` and its like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.api.progress import Progress, reported

if TYPE_CHECKING:
    from loraformat.bundle.reader import Bundle
    from loraformat.model.adapter import Adapter
    from loraformat.model.checkpoint import Checkpoint
    from loraformat.ops.formats import FormatsReport
    from loraformat.ops.info.report import InfoReport
    from loraformat.ops.verify import VerificationReport

__all__ = ["formats", "info", "open_adapter", "open_bundle", "open_model", "verify"]


def info(path: str | Path, *, allow_pickle: bool = False) -> InfoReport:
    """Describe a model or an adapter without reading its weights.

    Parameters
    ----------
    path : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.
    allow_pickle : bool
        Also read pickled ``.bin`` files, with a loader restricted to tensors.

    Returns
    -------
    InfoReport
        A `ModelInfo` or an `AdapterInfo`.

    Raises
    ------
    LoraFormatError
        If it cannot be opened.
    """
    from loraformat.ops.info.model import describe

    return describe(path, allow_pickle=allow_pickle)


def verify(
    path: str | Path, *, allow_pickle: bool = False, progress: Progress = False
) -> VerificationReport:
    """Verify structure and hashes of a model or an adapter.

    Parameters
    ----------
    path, allow_pickle
        As in `info`.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes done and in total.

    Returns
    -------
    VerificationReport
        Its findings are empty if everything is sound.
    """
    from loraformat.ops.verify import verify as run

    with reported(progress, "verify") as told:
        return run(path, allow_pickle=allow_pickle, progress=told)


def formats() -> FormatsReport:
    """List the converters, what each cannot represent, and missing packages.

    Returns
    -------
    FormatsReport
    """
    from loraformat.ops.formats import formats as run

    return run()


def open_model(path: str | Path) -> Checkpoint:
    """Open a base model in any format; no weight is read until it is asked for.

    Parameters
    ----------
    path : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.

    Returns
    -------
    Checkpoint
        A context manager; its ``tensors`` are read on demand.

    Raises
    ------
    UnsupportedError
        If it is an adapter, or in a format that can only be written.
    """
    from loraformat.ops.opening.model import open_model as run

    return run(path)


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check its structure; no weight is read.

    Parameters
    ----------
    path : str or Path
        A directory, or ``org/name[@revision]`` on the Hub.

    Returns
    -------
    Bundle
        A context manager; leaving it unmaps the shards.

    Raises
    ------
    FormatError
        If it breaks a rule of the specification.
    """
    from loraformat.ops.opening.model import open_source

    return open_source(path)


def open_adapter(path: str | Path, *, allow_pickle: bool = False) -> Adapter:
    """Open an adapter in any format.

    Parameters
    ----------
    path : str or Path
        A local path, ``BUNDLE/adapters/NAME``, or a Hub id.
    allow_pickle : bool
        Also read a pickled file, with a loader restricted to tensors.

    Returns
    -------
    Adapter
        A context manager; its ``deltas`` are read on demand.

    Raises
    ------
    LoraFormatError
        If it is no adapter, damaged, or more than a low-rank delta.
    """
    from loraformat.ops.opening.adapter import open_adapter as run

    return run(path, allow_pickle=allow_pickle)
