"""Publishing a directory: whole or not at all.

Everything is written into a work directory beside the target, ``NAME.partial``, and
that directory is renamed at the end; before each rename comes an fsync, after it an
fsync of the directory. So a reader sees the old state or the new one, also after a
power cut. The work directory is locked while it is written; after Ctrl-C or a kill it
stays, and a rerun with the same input and options continues it. After any other
failure it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from loraformat.errors import LoraFormatError, OutputError, ResourceError
from loraformat.exchange import exchange_directories

__all__ = ["Publication", "disk_full"]

_JOURNAL = ".loraformat-journal.json"
#: A planned size may be exceeded by directory blocks and JSON (fraction).
_SPACE_MARGIN = 1.02
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class Publication:
    """A directory being written.

    Parameters
    ----------
    target : Path
        Where it shall appear.
    plan : str
        Describes input and options; a work directory left by another plan is not continued.
    inputs : iterable of Path
        Files and directories that are read: the target must not be one of them.
    force : bool
        Replace a model that stands at the target.

    Attributes
    ----------
    work : Path
        Where to write until `commit`.
    resumed : dict
        What `record` kept of an interrupted run with the same plan, by key.

    Raises
    ------
    OutputError
        If the target exists, is or holds an input, or is being written by another process.
    """

    def __init__(
        self, target: Path, *, plan: str, inputs: Iterable[Path] = (), force: bool = False
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.work = self.target.with_name(self.target.name + ".partial")
        self.resumed: dict[str, Any] = {}
        self._plan = sha256(plan.encode("utf-8")).hexdigest()
        self._inputs = [Path(path) for path in inputs]
        self._force = force
        self._lock = -1
        self._journal: dict[str, Any] = {}
        self._committed = False

    def __enter__(self) -> Publication:
        self._refuse_input_as_output()
        self._refuse_existing()
        parent = self.target.parent
        if not parent.is_dir():
            raise OutputError("no such directory", path=parent, hint="make it first")
        try:
            self._open_work()
        except PermissionError as error:
            raise OutputError(f"cannot be written to: {error.strerror}", path=parent) from None
        try:
            self._refuse_existing()  # again, now that no other writer can publish
            self._load_journal()
        except BaseException:
            self._unlock()
            raise
        return self

    def _refuse_input_as_output(self) -> None:
        target = self.target.resolve()
        for source in self._inputs:
            real = source.resolve()
            same = target == real or _same_file(target, real)
            if same or real.is_relative_to(target):
                raise OutputError("is the input, or holds it", path=self.target, hint="choose another output")
            if real.is_dir() and target.is_relative_to(real):
                raise OutputError("lies inside the input", path=self.target, hint="choose another output")
        if self.target.is_dir():
            identities = {_identity(path) for path in self._inputs if path.is_file()}
            for path in self.target.iterdir():
                if path.is_file() and _identity(path) in identities:
                    raise OutputError(
                        f"holds {path.name}, which is a link to an input file", path=self.target,
                        hint="choose another output",
                    )

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_dir() and not self.target.is_symlink() and not any(self.target.iterdir()):
            return
        if not self._force:
            raise OutputError("already exists", path=self.target, hint="use --force to replace it")
        if self.target.is_symlink() or not self.target.is_dir():
            raise OutputError("is not a directory", path=self.target, hint="choose another output")
        if not any(self.target.glob("*.safetensors")):
            raise OutputError(
                "is a directory without weights and will not be replaced", path=self.target,
                hint="remove it yourself, or choose another output",
            )
        if adapters := sorted(path.name for path in self.target.glob("adapters/*")):
            raise OutputError(
                f"holds adapters that would be lost: {', '.join(adapters)}", path=self.target,
                hint="move them away, or choose another output",
            )

    def _open_work(self) -> None:
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.work)
            if self.work.is_symlink():
                raise OutputError("is a symbolic link", path=self.work, hint="remove it")
            self._lock = os.open(self.work, os.O_RDONLY)
            if not _try_lock(self._lock):
                os.close(self._lock)
                self._lock = -1
                raise OutputError(
                    f"is being written by another process{self._holder()}", path=self.target,
                    hint="wait for it to end",
                )
            # Its holder may have renamed it into place between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if _identity(self.work) == _identity_of(os.fstat(self._lock)):
                    return
            self._unlock()

    def _holder(self) -> str:
        try:
            return f" (process {json.loads((self.work / _JOURNAL).read_bytes())['process']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _load_journal(self) -> None:
        try:
            kept = json.loads((self.work / _JOURNAL).read_bytes())
            known = kept["done"] if kept["plan"] == self._plan else None
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known is None:
            self._empty_work()
        else:
            self.resumed = dict(known)
        self._journal = {"plan": self._plan, "process": os.getpid(), "done": dict(self.resumed)}
        self._save_journal()

    def _empty_work(self) -> None:
        for path in self.work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _save_journal(self) -> None:
        beside = self.work / (_JOURNAL + ".new")
        with open(beside, "wb") as file:
            file.write(json.dumps(self._journal).encode("utf-8"))
            _sync(file)
        os.replace(beside, self.work / _JOURNAL)
        _sync_directory(self.work)

    def record(self, key: str, value: Any) -> None:
        """Remember a finished piece of work, so that an interrupted run can skip it."""
        self._journal["done"][key] = value
        self._save_journal()

    def check_space(self, nbytes: int) -> None:
        """Refuse before the first byte if the disk cannot hold the output.

        Parameters
        ----------
        nbytes : int
            What is still to be written.

        Raises
        ------
        ResourceError
        """
        free = shutil.disk_usage(self.work).free
        if nbytes * _SPACE_MARGIN > free:
            raise ResourceError(
                f"needs {nbytes / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free",
                path=self.target, hint="free some space, or choose another disk",
            )

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file; it gets its name once it is whole and on the disk."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file  # type: ignore[misc]
            _sync(file)  # type: ignore[arg-type]
        os.replace(beside, path)
        _sync_directory(path.parent)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.create(name) as file:
            file.write(data)

    def commit(self) -> None:
        """Let the output appear at the target."""
        (self.work / _JOURNAL).unlink()
        _sync_directory(self.work)
        if self.target.is_dir() and any(self.target.iterdir()):
            exchange_directories(self.work, self.target)
            shutil.rmtree(self.work)
        else:
            os.rename(self.work, self.target)
        _sync_directory(self.target.parent)
        self._committed = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        resumable = isinstance(error, KeyboardInterrupt)
        if not self._committed and not resumable:
            shutil.rmtree(self.work, ignore_errors=True)
        self._unlock()
        if isinstance(error, OSError) and not isinstance(error, LoraFormatError):
            raise disk_full(error, self.target) from error

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)  # which frees the lock
            self._lock = -1


def disk_full(error: OSError, path: Path) -> LoraFormatError:
    """Turn an operating-system error while writing into one of ours."""
    if error.errno in _DISK_FULL:
        return ResourceError("the disk is full", path=path, hint="free some space and run again")
    return OutputError(f"cannot be written: {error.strerror or error}", path=path)


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identity(path: Path) -> tuple[int, int]:
    return _identity_of(path.stat())


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks on directories
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks (some NFS)
        return True
    return True


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
