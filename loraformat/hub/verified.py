"""Hash verification of files in the Hub cache, once per file.

What was found right is remembered by device, inode, size and time of change in
``$HF_HOME/loraformat/verified``, so that a second use of the same file costs nothing. A
file that was just downloaded and is wrong is removed: the next run fetches it again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loraformat.errors import HubError
from loraformat.hub.tree import TreeFile, digest, from_hash
from loraformat.storage.durable import new_file, write_all
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["check_snapshot", "wrong_content"]


def check_snapshot(
    snapshot: Path,
    repo: str,
    names: Iterable[str],
    listing: Callable[[], dict[str, TreeFile]],
    *,
    since: float,
) -> None:
    """Compare files of a snapshot with the Hub's hashes.

    `listing` returns the files of the snapshot's commit; it is called only if one of `names` was
    not checked before. If it returns nothing (offline), a file's blob in the cache, named by its
    hash, says it. `since` is when the download began (seconds since the epoch).

    Raises
    ------
    HubError
        Naming the first file that is another.
    InputError
        If a file leads out of the repository's place in the cache.
    """
    memory = _Memory(repo)
    folder = SafeDirectory(snapshot)
    unknown = [name for name in names if not memory.holds(snapshot / name)]
    if not unknown:
        return
    known = listing()
    for name in unknown:
        real = (snapshot / name).resolve()
        nbytes = real.stat().st_size if real.is_file() else 0
        blob = _blob(snapshot / name).name
        wanted = known.get(name) or (None if known else from_hash(name, nbytes, blob))
        with os.fdopen(folder.open(name), "rb") as file:
            if wanted is None:
                continue  # nobody says what it should be: not from the Hub, or a cache by copies
            found = digest(file, wanted)
            changed = os.fstat(file.fileno()).st_mtime
        if found != wanted.hash:
            raise _refused(snapshot / name, repo, found, wanted, fresh=changed >= since)
        memory.add(real)
    memory.save()


def _refused(path: Path, repo: str, found: str, wanted: TreeFile, *, fresh: bool) -> HubError:
    real = path.resolve()
    if fresh:
        for link in (_blob(path), real, path):
            link.unlink(missing_ok=True)
    hint = "run again to download it again" if fresh else f"remove {real} and run again"
    return wrong_content(f"{repo}/{wanted.path}", found, wanted, hint)


def _blob(path: Path) -> Path:
    """Return the path of a file's blob, which may be a link to a shared one."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def wrong_content(what: str, found: str, wanted: TreeFile, hint: str) -> HubError:
    """Return the error for a file whose hash differs from the Hub's."""
    kind = "SHA-256" if wanted.sha256 else "git SHA-1"
    return HubError(
        f"does not match the Hub: its {kind} is {found[:16]}…, wanted {wanted.hash[:16]}…",
        path=what,
        hint=hint,
    )


class _Memory:
    """Record of the verified files of one repository."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import constants

        place = Path(constants.HF_HOME) / "loraformat" / "verified"
        self._path = place / f"models--{repo.replace('/', '--')}.json"
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(self._path.read_bytes())
            self._known = kept if isinstance(kept, dict) else {}

    def holds(self, path: Path) -> bool:
        """Tell whether a file was verified and is unchanged since."""
        real = path.resolve()
        return str(real) in self._known and self._known[str(real)] == _stamp(real)

    def add(self, real: Path) -> None:
        self._known[str(real)] = _stamp(real)

    def save(self) -> None:
        """Save the record; if that fails, the next run hashes again."""
        beside = self._path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(beside) as file:
                write_all(file, json.dumps(self._known).encode("utf-8"))
            os.replace(beside, self._path)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
