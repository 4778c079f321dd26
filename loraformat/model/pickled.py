"""Restricted loading of tensors from torch pickles.

A pickle can hold a program. torch's ``weights_only`` loader refuses every one that asks for more
than tensors and plain containers; it maps the file, so that a tensor costs memory only while it
is used. Nothing here runs unless a user has said ``--allow-pickle``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from loraformat.errors import FileChangedError, InputError, printable
from loraformat.model.checkpoint import DenseTensor
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.arrays import array_bytes
from loraformat.tensors.dtypes import ITEM_BYTES, TORCH_NAMES
from loraformat.tensors.torch_arrays import array_of

__all__ = ["Pickled", "open_pickle"]


@dataclass(frozen=True, slots=True)
class Pickled:
    """The tensors of one file.

    Attributes
    ----------
    tensors : dict of str to DenseTensor
        By name, lazily; in the order of the file.
    same : dict of str to str
        Names of tensors that are the very numbers of an earlier one, which is named.
    close : callable
        Raises if the file has changed since it was opened.
    """

    tensors: dict[str, DenseTensor]
    same: dict[str, str]
    close: Callable[[], None]


def open_pickle(folder: SafeDirectory, name: str) -> Pickled:
    """Open a file that ``torch.save`` wrote of a dictionary of tensors.

    Raises `InputError` if it is no archive of torch, asks for anything but tensors, or claims more
    numbers than it holds.
    """
    import torch

    path = folder.path / name
    with os.fdopen(folder.open(name), "rb") as file:
        before = os.fstat(file.fileno())
        _check_archive(file, path)
    try:
        loaded = torch.load(path.resolve(), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a stranger's pickle may fail in any way
        raise InputError(
            f"cannot be loaded by the restricted loader: {printable(str(error).splitlines()[0])}",
            path=path,
            hint="do not load it by other means unless you trust its source",
        ) from None
    if not isinstance(loaded, dict):
        raise InputError("does not contain a dictionary of tensors", path=path)
    tensors, same = _tensors(loaded, before.st_size, path)

    def close() -> None:
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise FileChangedError("changed while it was being read", path=path, hint="run again")

    return Pickled(tensors, same, close)


def _tensors(
    loaded: dict[Any, Any], size: int, path: Path
) -> tuple[dict[str, DenseTensor], dict[str, str]]:
    import torch

    names = {getattr(torch, word): name for name, word in TORCH_NAMES.items()}
    tensors: dict[str, DenseTensor] = {}
    same: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not _is_plain(value, names):
            raise InputError(f"entry {printable(name)} is not a numeric tensor", path=path)
        dtype, shape = names[value.dtype], tuple(value.shape)
        if prod(shape) * ITEM_BYTES[dtype] > size:
            # A view may show a few bytes as any number of elements.
            raise InputError(
                f"tensor {printable(name)} of shape {list(shape)} is larger than the file",
                path=path,
            )
        place = (value.data_ptr(), dtype, shape, value.stride())
        if value.numel() and (first := places.setdefault(place, name)) != name:
            same[name] = first
        tensors[name] = DenseTensor(name, dtype, shape, partial(_bytes, value))
    return tensors, same


def _is_plain(value: Any, names: dict[Any, str]) -> bool:
    import torch

    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in names
    )


def _check_archive(file: Any, path: Path) -> None:
    """Refuse what is not an archive of uncompressed members, as torch writes it since 1.6."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"is not a torch archive: {printable(error)}",
            path=path,
            hint="files saved by torch before 1.6 must be saved again with a newer version",
        ) from None
    if packed:
        raise InputError(f"member {printable(packed[0].filename)} is compressed", path=path)


def _bytes(value: Any) -> memoryview:
    return array_bytes(array_of(value))
