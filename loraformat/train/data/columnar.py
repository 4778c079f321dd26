"""Directories that ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` of datasets write.

A table's ``state.json`` names its Arrow files in order; a directory of splits has a
``dataset_dict.json``. The files are read without ``datasets``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraformat.errors import InputError, printable
from loraformat.storage import strict_json
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.train.data.arrow_file import open_arrow
from loraformat.train.data.data_file import DataFile
from loraformat.train.data.row import RowSource

__all__ = ["has_splits", "is_saved", "open_saved"]

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_STATE = 16 << 20


def is_saved(directory: Path) -> bool:
    """Tell whether a directory is a saved data set, or one of several splits."""
    return has_splits(directory) or all((directory / n).is_file() for n in (_STATE, _INFO))


def has_splits(directory: Path) -> bool:
    """Tell whether a directory is a data set of several splits."""
    return (directory / _SPLITS).is_file()


def open_saved(directory: Path, split: str) -> list[RowSource]:
    """Open the files of a saved data set.

    Parameters
    ----------
    directory : Path
    split : str
        If there are several.

    Raises
    ------
    InputError
        If there is no such split, or the directory is not sound.
    """
    folder, within = SafeDirectory(directory), ""
    if has_splits(directory):
        splits = _read(folder, _SPLITS).get("splits")
        if not isinstance(splits, list) or split not in splits:
            known = ", ".join(map(str, splits)) if isinstance(splits, list) else "nothing"
            raise InputError(
                f"has no split {split!r}; it has {printable(known)}",
                path=directory,
                hint="name one with --split",
            )
        within = f"{split}/"
    files = _read(folder, within + _STATE).get("_data_files")
    if not isinstance(files, list):
        files = []
    found = [one.get("filename") for one in files if isinstance(one, dict)]
    names = [name for name in found if isinstance(name, str)]
    if not names or len(names) != len(found):
        raise InputError(f"{within}{_STATE} names no files", path=directory)
    return [open_arrow(DataFile.inside(folder, within + name)) for name in names]


def _read(folder: SafeDirectory, name: str) -> dict[str, Any]:
    try:
        found = strict_json.loads(folder.read(name, _LARGEST_STATE))
    except strict_json.StrictJsonError as error:
        raise InputError(f"{name} is not JSON: {error}", path=folder.path) from None
    if not isinstance(found, dict):
        raise InputError(f"{name} is not a JSON object", path=folder.path)
    return found
