"""Atomic output of a directory.

Everything is written into a work directory beside the target, ``NAME.partial``, and
that directory is renamed at the end; before each rename comes an fsync, after it an
fsync of the directory. So a reader sees the old state or the new one, also after a
power cut. The work directory is locked while it is written. After a kill, Ctrl-C, a full
disk or a failed network its finished shards stay, and a rerun with the same input and
options continues behind them. After any other failure it is removed.
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

from loraformat.errors import HubError, LoraFormatError, OutputError, ResourceError, printable
from loraformat.storage.atomic_swap import swap_directories, undo_interrupted_swap
from loraformat.storage.durable import (
    identity,
    lock,
    locked,
    new_file,
    open_directory,
    sync_directory,
    write_all,
)
from loraformat.storage.output_rules import holds_weights, refuse_existing, refuse_input_as_output

__all__ = ["AtomicOutput", "disk_full"]

_JOURNAL = ".loraformat-journal.json"
_JOURNAL_NEW = _JOURNAL + ".new"
#: A planned size may be exceeded by directory blocks and JSON (fraction).
_SPACE_MARGIN = 1.02
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
#: After these a rerun has a chance, and finished files are worth keeping.
_RESUMABLE = (KeyboardInterrupt, ResourceError, MemoryError, HubError)


class AtomicOutput:
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
    work_name : str, optional
        Name of the work directory, if ``NAME.partial`` would not do.

    Attributes
    ----------
    work : Path
        Where to write until `commit`.
    resumed : dict
        What `record` kept of an interrupted run with the same plan, by file name. Nothing
        says that those files are still whole: who uses one checks it.
    published : bool
        The output stands at the target.

    Raises
    ------
    OutputError
        If the target exists, is or holds an input, or is being written by another process.
    ResourceError
        If the disk is full.
    """

    def __init__(
        self,
        target: Path,
        *,
        plan: str,
        inputs: Iterable[Path] = (),
        force: bool = False,
        work_name: str | None = None,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.work = self.target.parent / (work_name or self.target.name + ".partial")
        self.resumed: dict[str, Any] = {}
        self.published = False
        self._plan = sha256(plan.encode("utf-8")).hexdigest()
        self._inputs = [Path(path) for path in inputs]
        self._force = force
        self._lock = -1
        self._journal: dict[str, Any] = {}

    @property
    def file_name(self) -> str:
        """File name to `create` for a single-file output: the target's name."""
        return self.target.name

    def __enter__(self) -> AtomicOutput:
        try:
            refuse_input_as_output(self.target, self.work, self._inputs)
            self._refuse_existing()
            if not self.target.parent.is_dir():
                raise OutputError(
                    "no such directory", path=self.target.parent, hint="create it first"
                )
            self._open_work()
            self._undo_interrupted()
            self._refuse_existing()  # again, now that no other writer can publish
            self._load_journal()
        except BaseException as error:
            self._leave(keep=bool(self.resumed))
            if isinstance(error, OSError):
                raise disk_full(error, self.target) from error
            raise
        return self

    def _refuse_existing(self) -> None:
        refuse_existing(self.target, force=self._force)

    def _undo_interrupted(self) -> None:
        undo_interrupted_swap(self.work, self.target)

    def _open_work(self) -> None:
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.work)
            try:
                self._lock = open_directory(self.work)
            except FileNotFoundError:
                continue  # its holder has just renamed it into place
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                raise OutputError(
                    "is not a directory, but is needed to prepare this output",
                    path=self.work,
                    hint="remove it",
                ) from None
            if not lock(self._lock):
                self._unlock()
                raise OutputError(
                    f"is being written by another process{self._holder()}",
                    path=self.target,
                    hint="wait for it to end",
                )
            # Its holder may have renamed it into place between our open and our lock.
            if self._holds(self.work):
                return
            self._unlock()

    def _holds(self, path: Path) -> bool:
        """Tell whether a path is still the directory that is locked."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self._lock >= 0 and identity(path) == identity(self._lock)
        return False

    def _holder(self) -> str:
        try:
            return f" (process {int(json.loads((self.work / _JOURNAL).read_bytes())['process'])})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _load_journal(self) -> None:
        try:
            kept = json.loads((self.work / _JOURNAL).read_bytes())
            if kept["plan"] == self._plan:
                self.resumed = dict(kept["done"])
        except (OSError, ValueError, KeyError, TypeError):
            self._refuse_strange_work()
        self._journal = {"plan": self._plan, "process": os.getpid(), "done": dict(self.resumed)}
        self._empty_work()
        self._save_journal()

    def _refuse_strange_work(self) -> None:
        names = {path.name for path in self.work.iterdir()}
        if _JOURNAL not in names and names - {_JOURNAL_NEW} and not holds_weights(self.work):
            raise OutputError(
                "is not a work directory of loraformat, but is needed to prepare this output",
                path=self.work,
                hint="move it away",
            )

    def _empty_work(self) -> None:
        """Remove everything except finished files and the journal."""
        done = {Path(name).parts[0] for name in self._journal.get("done", {}) if Path(name).parts}
        for path in self.work.iterdir():
            if path.name not in done | {_JOURNAL}:
                _remove(path)

    def _save_journal(self) -> None:
        beside = self.work / _JOURNAL_NEW
        with new_file(beside) as file:
            write_all(file, json.dumps(self._journal).encode("utf-8"))
            os.fsync(file.fileno())
        os.replace(beside, self.work / _JOURNAL)
        sync_directory(self.work)

    def record(self, key: str, value: Any) -> None:
        """Remember a finished file, so that an interrupted run can skip it.

        Parameters
        ----------
        key : str
            Its name.
        value : JSON value
            Whatever is needed to check it and to go on.
        """
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
                f"needs {nbytes / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB free",
                path=self.target,
                hint="free some space, or choose another disk",
            )

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file that is renamed once it is complete and synced.

        The file is unbuffered: its ``write`` may take less than it was given.
        """
        path = self.work / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise OutputError(f"file name {printable(name)} leads out of it", path=self.target)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        beside = path.with_name(path.name + ".tmp")
        with new_file(beside) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(beside, path)
        for directory in path.parents:
            sync_directory(directory)
            if directory == self.work:
                break

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.create(name) as file:
            write_all(file, data)

    def commit(self) -> None:
        """Move the finished output to the target.

        Raises
        ------
        OutputError
            If something else has appeared there meanwhile.
        """
        self._refuse_existing()
        if self.target.is_dir() and any(self.target.iterdir()):
            # Nobody may be adding to it; and the next writer must not take what is left of it
            # for its own.
            with locked(self.target) as alone:
                if not alone:
                    raise OutputError(
                        "is being changed by another process",
                        path=self.target,
                        hint="wait for it to end",
                    )
                self._refuse_existing()
                self._close_journal()
                swap_directories(self.work, self.target)
                self.published = True
                sync_directory(self.target.parent)
                self._remove_old()
        else:
            self._close_journal()
            os.rename(self.work, self.target)
            self.published = True
            sync_directory(self.target.parent)

    def _close_journal(self) -> None:
        os.unlink(self.work / _JOURNAL)
        sync_directory(self.work)

    def _remove_old(self) -> None:
        """Remove the replaced output; a journal marks it for clean-up if the process is killed."""
        self._journal = {"plan": "", "process": os.getpid(), "done": {}}
        try:
            self._save_journal()
            self._remove_work()
        except OSError as error:
            raise OutputError(
                f"is in place, but the output that it replaced could not be removed from "
                f"{self.work.name}: {error.strerror}",
                path=self.target,
                hint="remove that directory",
            ) from error

    def _remove_work(self) -> None:
        self._journal["done"] = {}
        self._empty_work()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.work / _JOURNAL)
        os.rmdir(self.work)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            explained = disk_full(error, self.target)
            self._leave(keep=isinstance(explained, ResourceError))
            raise explained from error
        self._leave(keep=isinstance(error, _RESUMABLE))

    def _leave(self, *, keep: bool) -> None:
        """Release the lock and remove everything that is not worth keeping."""
        try:
            if self._holds(self.work):
                with contextlib.suppress(OSError):
                    if keep and self._journal.get("done"):
                        self._empty_work()
                    elif self._journal:
                        self._remove_work()
                    else:  # nothing says that what it holds is ours
                        os.rmdir(self.work)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)  # which frees the lock
            self._lock = -1


def disk_full(error: OSError, path: Path) -> LoraFormatError:
    """Convert an operating-system write error to a loraformat error."""
    if error.errno in _DISK_FULL:
        return ResourceError(
            "the disk is full",
            path=path,
            hint="free some space and run again: finished shards are kept",
        )
    if error.errno == errno.EFBIG:
        return ResourceError(
            "the file system or a limit forbids files this large",
            path=path,
            hint="use a smaller --max-shard-size",
        )
    return OutputError(f"cannot be written: {error.strerror or error}", path=path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)
