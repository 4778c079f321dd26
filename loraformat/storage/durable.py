"""Durable creation, syncing and locking of files and directories.

Thin functions over the operating system; `loraformat.storage.atomic_output` puts them in order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "identity",
    "lock",
    "locked",
    "new_file",
    "open_directory",
    "sync_directory",
    "write_all",
]


def new_file(path: Path) -> BinaryIO:
    """Open a file that does not exist yet, unbuffered; its mode follows the umask."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    return os.fdopen(descriptor, "wb", buffering=0)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file, in several writes if needed."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]


def identity(place: Path | int) -> tuple[int, int]:
    """Return the device and inode of a path or descriptor."""
    status = os.stat(place)
    return status.st_dev, status.st_ino


def open_directory(path: Path) -> int:
    """Open a directory, not a link to one, and return its descriptor."""
    # O_NONBLOCK: a FIFO of that name must be refused, not waited for.
    flags = (
        os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
    )
    descriptor = os.open(path, flags)
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return descriptor


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Try to lock a directory and return whether that succeeded."""
    descriptor = open_directory(directory)
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take the exclusive lock of an open directory; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks on directories
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks (some NFS)
        return True
    return True


def sync_directory(path: Path) -> None:
    """Sync a directory's entries to disk."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system knows how
            raise
    finally:
        os.close(descriptor)
