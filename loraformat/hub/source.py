"""Input resolution: a local path, or ``org/name[@revision]`` on the Hugging Face Hub.

A name is looked up, the files that a checkpoint can hold are fetched into huggingface_hub's
cache, and each is compared with the hash that the Hub has of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from loraformat.errors import HubError, InputError, printable
from loraformat.hub.explain import explained
from loraformat.hub.tree import TreeFile, list_files
from loraformat.hub.verified import check_snapshot
from loraformat.storage.safe_paths import is_adapter_name

__all__ = ["NOT_WANTED", "Source", "cached", "download", "hub_id", "resolve"]

#: Neither part begins or ends with a dot or a hyphen: ``./x`` and ``../x`` are paths.
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]{{1,200}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Weights in formats that are never read; they would double the download.
NOT_WANTED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite",
    "*.gguf", "*.mlmodel", "*.npz", "original/*", "onnx/*", "openvino/*", "coreml/*",
]  # fmt: skip

#: Pickled weights that are read on request.
_PICKLES = ("adapter_model.bin", "pytorch_model*.bin")
#: A file system's clock may be behind by this much (seconds).
_CLOCK_TICK = 0.1


@dataclass(frozen=True, slots=True)
class Source:
    """A resolved input: a local path, with its Hub id and commit if it came from there."""

    path: Path
    repo: str | None = None
    revision: str | None = None


def hub_id(word: str) -> tuple[str, str | None] | None:
    """Parse a Hub id; None if the text does not have that form.

    Examples
    --------
    >>> hub_id("org/name@v1"), hub_id("org/name"), hub_id("./name")
    (('org/name', 'v1'), ('org/name', None), None)
    """
    match = _HUB_ID.fullmatch(word)
    return None if match is None else (match["repo"], match["revision"])


def resolve(word: str | Path, *, pickles: bool = False) -> Source:
    """Resolve an input: a local path if it exists, otherwise a Hub repository.

    Parameters
    ----------
    word : str or Path
        A path, ``org/name[@revision]``, or ``org/name[@revision]/adapters/NAME``.
    pickles : bool
        Fetch pickled weights, too, if it has nothing else.

    Raises
    ------
    InputError
        If it is neither.
    HubError
        If the Hub cannot be reached or refuses, or a file is not what it has.

    Examples
    --------
    >>> resolve(".").path
    PosixPath('.')
    """
    if not str(word):
        raise InputError("an input name is empty", hint="give a path or ORG/NAME")
    path = Path(word)
    exists = os.path.lexists(path)  # which, unlike Path.exists, has an answer for every word
    bundle, inside, adapter = str(word).rpartition("/adapters/")
    if inside and not exists and hub_id(bundle) and is_adapter_name(adapter):
        whole = resolve(bundle)
        return Source(whole.path / "adapters" / adapter, whole.repo, whole.revision)
    named = hub_id(str(word))
    if exists or named is None:
        if not exists:
            raise InputError(
                "no such file or directory", path=path, hint="Hub ids have the form org/name"
            )
        return Source(path)
    repo, revision = named
    snapshot = download(repo, revision)
    commit = snapshot.name if _COMMIT.fullmatch(snapshot.name) else revision
    if any(snapshot.rglob("*.safetensors")):
        return Source(snapshot, repo, commit)
    if pickles:
        names = _listing(repo, snapshot.name) or _fetched(snapshot, "*.bin")
        for glob in _PICKLES:
            if any(fnmatch(name, glob) for name in names):
                download(repo, commit, only=glob)
    pickle = any(any(snapshot.glob(glob)) for glob in _PICKLES)
    return Source((not pickle and _one_gguf(snapshot, repo, commit)) or snapshot, repo, commit)


def _one_gguf(snapshot: Path, repo: str, commit: str | None) -> Path | None:
    """Download the GGUF file of a repository that contains a single one."""
    listed = _listing(repo, snapshot.name)
    names = [name for name in listed or _fetched(snapshot, "*.gguf") if name.endswith(".gguf")]
    if len(names) > 1:
        raise InputError(
            f"holds {len(names)} GGUF files, {printable(', '.join(sorted(names)))}",
            path=repo,
            hint=f"download one: loraformat pull {repo} DST --include NAME",
        )
    return download(repo, commit, only=names[0].replace("[", "[[]")) / names[0] if names else None


def download(repo: str, revision: str | None, only: str | None = None) -> Path:
    """Download a repository into the Hub cache and verify its hashes.

    `only` is the glob of the one file that is wanted; by default all that a checkpoint can hold.

    Returns
    -------
    Path
        ``.../snapshots/COMMIT`` in the cache; never to be written to.

    Raises
    ------
    HubError
        If the Hub cannot be reached or refuses, or a file is not what it has.
    """
    from huggingface_hub import snapshot_download

    ignored = NOT_WANTED if only is None else None
    began = time.time() - _CLOCK_TICK
    with explained(f"{repo}@{revision}" if revision else repo, word=True):
        found = snapshot_download(
            repo, revision=revision, allow_patterns=only, ignore_patterns=ignored
        )
    snapshot = Path(found)
    names = _fetched(snapshot, only)
    check_snapshot(snapshot, repo, names, lambda: _listing(repo, snapshot.name), since=began)
    return snapshot


def cached(repo: str, revision: str | None) -> Path | None:
    """Return the cached files of a repository, without network access.

    As `download` returns it, but files may be missing; None if there is nothing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _fetched(snapshot: Path, only: str | None) -> list[str]:
    """Return the requested files of a snapshot, which may contain others."""
    present = [
        path.relative_to(snapshot).as_posix()
        for path in sorted(snapshot.rglob("*"))
        if path.is_file() or path.is_symlink()
    ]
    if only is not None:
        return [name for name in present if fnmatch(name, only)]
    return [name for name in present if not any(fnmatch(name, glob) for glob in NOT_WANTED)]


def _listing(repo: str, commit: str) -> dict[str, TreeFile]:
    """List the files of a commit; empty if the Hub is unreachable."""
    if _COMMIT.fullmatch(commit):
        with contextlib.suppress(HubError), explained(repo):
            return list_files(repo, commit)
    return {}
