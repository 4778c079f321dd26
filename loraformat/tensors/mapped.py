"""Memory-mapped files and safetensors files.

Nothing is read but the header. The mapping is exactly as long as the file was when
it was opened, from the same descriptor, and `MappedFile.close` says so if the file
changed meanwhile. Pages that have been used are given back to the kernel at once, so
that walking over a large file does not fill memory.

A mapped file that somebody truncates kills the process that looks at it (SIGBUS), the
command line with a sentence (`loraformat.tensors.truncation`). Where that is likely (a network
file system), set ``LORAFORMAT_IO=pread``: tensors are then read into memory one at a
time, and a file that became shorter is an error.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from loraformat.errors import FileChangedError, InputError, printable
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors import header as headers
from loraformat.tensors.header import Entry, Header

__all__ = ["MappedBytes", "MappedFile"]


class MappedBytes:
    """A memory-mapped file of any kind; its bytes are views on the mapping.

    Parameters
    ----------
    folder : SafeDirectory
        Where it lies.
    name : str
        File name in that folder.

    Attributes
    ----------
    path : Path
    nbytes : int
        Size of the file.
    descriptor : int
        Of the open file.
    """

    def __init__(self, folder: SafeDirectory, name: str) -> None:
        self.path: Path = folder.path / name
        self.descriptor = folder.open(name)
        self._map: mmap.mmap | None = None
        self._identity = self._stat()
        self.nbytes = self._identity[0]

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def map(self) -> None:
        """Map the file at its size when opened, unless ``LORAFORMAT_IO=pread``."""
        if self.nbytes and os.environ.get("LORAFORMAT_IO") != "pread":
            self._map = mmap.mmap(self.descriptor, self.nbytes, access=mmap.ACCESS_READ)

    @property
    def address(self) -> int | None:
        """Address of the mapping; None if nothing is mapped."""
        import numpy

        return None if self._map is None else numpy.frombuffer(self._map, numpy.uint8).ctypes.data

    def bytes_between(self, begin: int, end: int) -> memoryview:
        """Return a read-only view on a range of bytes; nothing is read yet if it is mapped."""
        if self._map is None:
            return self.read_between(begin, end)
        return memoryview(self._map)[begin:end]

    def read_between(self, begin: int, end: int) -> memoryview:
        """Read a range of bytes into memory."""
        data = bytearray(end - begin)
        filled = 0
        while filled < len(data):
            try:
                got = os.preadv(self.descriptor, [memoryview(data)[filled:]], begin + filled)
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror}", path=self.path) from None
            if got == 0:
                raise FileChangedError("became shorter while it was being read", path=self.path)
            filled += got
        return memoryview(data).toreadonly()

    def range_releaser(self, ranges: Sequence[tuple[int, int]]) -> Callable[[], None]:
        """Return a function that gives the pages of these ranges back to the kernel."""

        def release() -> None:
            if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
                return
            page = mmap.PAGESIZE
            for begin, end in ranges:
                first = begin // page * page
                if end - first >= page:
                    self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

        return release

    def check_unchanged(self) -> None:
        """Raise `FileChangedError` if the file changed after it was opened."""
        if self._stat() != self._identity:
            raise FileChangedError(
                "changed while it was being read",
                path=self.path,
                hint="run again when nothing else writes to it",
            )

    def close(self) -> None:
        """Unmap, after `check_unchanged`."""
        if self.descriptor < 0:
            return
        try:
            self.check_unchanged()
        finally:
            os.close(self.descriptor)
            self.descriptor = -1
            if self._map is not None:
                # If a view is still held, the mapping goes when the view does.
                with contextlib.suppress(BufferError):
                    self._map.close()
                self._map = None

    def abandon(self) -> None:
        """Unmap without checking the file."""
        with contextlib.suppress(FileChangedError):
            self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({printable(self.path)})"


class MappedFile(MappedBytes):
    """A safetensors file open for reading.

    Parameters
    ----------
    folder : SafeDirectory
        Where it lies.
    name : str
        File name in that folder.
    profile : bool
        Hold it to the rules for shards of a bundle.
    foreign : bool
        It is no part of a bundle, and may have types that the specification has not.

    Attributes
    ----------
    path : Path
    header : Header
    header_sha256 : str
        Of the length prefix and the JSON.
    nbytes : int
        Size of the file.

    Raises
    ------
    FormatError
        If the header breaks a rule; nothing is mapped then.
    """

    def __init__(
        self, folder: SafeDirectory, name: str, *, profile: bool = False, foreign: bool = False
    ) -> None:
        super().__init__(folder, name)
        try:
            self.header: Header = self._read_header(profile, foreign)
            self.map()
        except BaseException:
            self.abandon()
            raise

    def _read_header(self, profile: bool, foreign: bool) -> Header:
        with os.fdopen(os.dup(self.descriptor), "rb") as file:
            prefix = file.read(8)
            start = headers.data_start(prefix, self.nbytes, self.path)
            raw = file.read(start - 8)
        self.header_sha256 = sha256(prefix + raw).hexdigest()
        return headers.parse_header(raw, self.nbytes, self.path, profile=profile, foreign=foreign)

    def view(self, name: str) -> memoryview:
        """Return a tensor's bytes: a read-only view on the mapping, nothing is read yet."""
        return self.bytes_between(*self._range(self.header.entries[name]))

    def _range(self, entry: Entry) -> tuple[int, int]:
        return self.header.data_start + entry.begin, self.header.data_start + entry.end

    def releaser(self, *names: str) -> Callable[[], None]:
        """Return a function that gives the pages of these tensors back to the kernel."""
        return self.range_releaser([self._range(self.header.entries[name]) for name in names])
