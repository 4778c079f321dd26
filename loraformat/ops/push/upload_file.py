"""A file that is going to be published: where it lies, what it is called, what it hashes to."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from loraformat.bundle.integrity import file_record
from loraformat.errors import UnsupportedError, printable
from loraformat.hub.tree import TreeFile, digest
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import is_portable_path

__all__ = ["UploadFile"]


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One file.

    Attributes
    ----------
    path : str
        In the repository, with ``/``.
    content : Path or bytes
        Where it lies, links resolved; or what it holds.
    nbytes : int
    sha256 : str
    """

    path: str
    content: Path | bytes
    nbytes: int
    sha256: str

    @classmethod
    def of_bytes(cls, path: str, data: bytes) -> UploadFile:
        """Return a file that exists in memory only."""
        return cls(path, data, len(data), sha256(data).hexdigest())

    @classmethod
    def of_folder(cls, folder: SafeDirectory, name: str, path: str | None = None) -> UploadFile:
        """Hash a file of a directory.

        Raises
        ------
        InputError
            If it is missing, or leads out of it.
        UnsupportedError
            If not every system can have a file of that name.
        """
        path = path or name
        if not is_portable_path(path):
            raise UnsupportedError(
                f"{printable(path)} is no name that every system takes",
                path=folder.path,
                hint="rename the file",
            )
        record = file_record(folder, name)
        return cls(path, (folder.path / name).resolve(), record.bytes, record.sha256)

    def matches(self, there: TreeFile | None) -> bool:
        """Tell whether the Hub has these bytes."""
        if there is None or there.nbytes != self.nbytes:
            return False
        if there.sha256 is not None:
            return there.sha256 == self.sha256
        with self.open() as file:
            return digest(file, there) == there.git_oid

    def open(self) -> BinaryIO:
        """Open it for reading."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return cast(BinaryIO, os.fdopen(os.open(self.content, os.O_RDONLY), "rb"))
