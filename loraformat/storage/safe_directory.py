"""Untrusted model directories: files are opened without leaving the directory.

A name in an index or a manifest is a stranger's text, and so is a symbolic link in a
repository. A file is opened only if it is a regular file whose real place is inside
the directory. The one exception is the Hub's cache, where every file of a snapshot is
a link to ``blobs`` two floors up, inside the same repository's folder; and that may be one
to ``blobs`` of the whole cache, which repositories share (Xet).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from loraformat.errors import InputError, printable

__all__ = ["SafeDirectory"]

_MAX_FILES = 10_000
_MAX_FLOORS = 4
#: By this huggingface_hub marks the directory that it shares among repositories.
_SHARED = ".huggingface-shared-blobs"
_SKIPPED = {"__pycache__", "node_modules"}


class SafeDirectory:
    """Directory handle that opens only files inside it.

    Parameters
    ----------
    path : Path
        The directory; the user may name it through links.

    Raises
    ------
    InputError
        If it is not a directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            problem = "not a directory" if path.exists() else "no such file or directory"
            raise InputError(problem, path=path)
        self._real = path.resolve()
        self._bounds = [self._real]
        # An adapter of a bundle in the cache lies two floors further down.
        inside = self._real.parent.name == "adapters"
        snapshot = self._real.parent.parent if inside else self._real
        if snapshot.parent.name == "snapshots":
            repository = snapshot.parent.parent
            self._bounds.append(repository / "blobs")
            shared = repository.parent / "blobs"
            if (shared / _SHARED).is_file():
                self._bounds.append(shared)

    def open(self, name: str) -> int:
        """Open a file for reading and return its descriptor.

        Parameters
        ----------
        name : str
            Relative path with ``/``.

        Raises
        ------
        InputError
            If it is missing, is not a regular file, or leads out of the directory.
        """
        path = self.path / name
        try:
            real = path.resolve(strict=True)
            if not any(real.is_relative_to(bound) for bound in self._bounds):
                raise InputError(
                    f"leads out of its directory, to {printable(real)}",
                    path=path,
                    hint="replace the link by the file itself if you trust it",
                )
            # O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
            descriptor = os.open(
                real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"cannot be opened: {reason}", path=path) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError("is not a regular file", path=path)
        return descriptor

    def read(self, name: str, limit: int) -> bytes:
        """Return a file's bytes, refusing files longer than ``limit`` bytes before reading."""
        with os.fdopen(self.open(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise InputError(
                    f"{size} bytes long, wanted at most {limit}", path=self.path / name
                )
            return file.read(size)  # not more: read() allocates what it is asked for

    def has(self, name: str) -> bool:
        """Tell whether the directory holds a regular file of that name."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return (self.path / name).stat().st_size

    def names(self) -> list[str]:
        """List non-hidden files, sorted, as relative paths with ``/``.

        Raises
        ------
        InputError
            If there are more than 10,000: this is no model directory.
        """
        return sorted(self._walk(self.path, "", 0))

    def _walk(self, directory: Path, prefix: str, floor: int) -> Iterator[str]:
        found = sorted(os.scandir(directory), key=lambda entry: entry.name)
        for count, entry in enumerate(found, 1):
            if count > _MAX_FILES:
                raise InputError(
                    f"holds more than {_MAX_FILES} files, no model does", path=directory
                )
            if entry.name.startswith(".") or entry.name in _SKIPPED:
                continue
            if entry.is_dir(follow_symlinks=False):
                if floor < _MAX_FLOORS:
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/", floor + 1)
            elif entry.is_file():
                yield f"{prefix}{entry.name}"
