"""Inputs by name: a local path, or ``org/name[@revision]`` on the Hugging Face Hub.

Downloading, caching, authentication and ``HF_HUB_OFFLINE`` are huggingface_hub's; this
module decides what is meant, asks for the files a checkpoint can hold, and says in one
line what went wrong.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from loraformat.errors import HubError, InputError, LoraFormatError, ResourceError, printable

__all__ = ["Source", "resolve"]

_HUB_ID = re.compile(
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?:@(?P<revision>[\w./-]{1,200}))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Weights in formats that are never read; they would double the download.
_NOT_WANTED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite",
    "*.gguf", "*.mlmodel", "*.npz", "original/*", "onnx/*", "openvino/*", "coreml/*",
]  # fmt: skip

_ADAPTER_PICKLE = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class Source:
    """An input that is on this machine now.

    Attributes
    ----------
    path : Path
    repo, revision : str or None
        Hub id and commit, if it came from there.
    """

    path: Path
    repo: str | None = None
    revision: str | None = None


def resolve(word: str | Path, *, pickles: bool = False) -> Source:
    """Find an input: the local path of that name, else the Hub repository.

    Parameters
    ----------
    word : str or Path
    pickles : bool
        Fetch the pickle of an adapter, too, if it has nothing else.

    Raises
    ------
    InputError
        If it is neither.
    HubError
        If the Hub cannot be reached or refuses.

    Examples
    --------
    >>> resolve(".").path
    PosixPath('.')
    """
    path = Path(word)
    match = _HUB_ID.fullmatch(str(word))
    exists = os.path.lexists(path)  # which, unlike Path.exists, has an answer for every word
    if exists or match is None:
        if not exists:
            raise InputError(
                "no such file or directory", path=path, hint="Hub ids have the form org/name"
            )
        return Source(path)
    snapshot = _download(match["repo"], match["revision"])
    if pickles and not any(snapshot.glob("*.safetensors")):
        same = snapshot.name if _COMMIT.fullmatch(snapshot.name) else match["revision"]
        snapshot = _download(match["repo"], same, only=_ADAPTER_PICKLE)
    revision = snapshot.name if _COMMIT.fullmatch(snapshot.name) else match["revision"]
    return Source(snapshot, match["repo"], revision)


def _download(repo: str, revision: str | None, only: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    ignored = _NOT_WANTED if only is None else None
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=only, ignore_patterns=ignored
        )
        return Path(found)
    except Exception as error:  # its tree is wide: HTTP, offline, cache, validation, OSError
        raise _explain(error, f"{repo}@{revision}" if revision else repo) from error


def _explain(error: Exception, what: str) -> LoraFormatError:
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "the disk of the Hub's cache is full",
            path=what,
            hint="free some space, or name another directory with HF_HOME",
        )
    # What the cache lacks is told first; why it was asked at all is the cause.
    chain = (error.__cause__, error)
    reasons = (
        (errors.GatedRepoError, "is gated", "accept its terms on the Hub, then run: hf auth login"),
        (
            errors.RevisionNotFoundError,
            "has no such revision",
            "look at its branches and tags on the Hub",
        ),
        (
            errors.RepositoryNotFoundError,
            "is neither a local path nor a repository on the Hub",
            "check the spelling; for a private repository run: hf auth login",
        ),
        (
            errors.HFValidationError,
            "is neither a local path nor a valid Hub id",
            "check the spelling",
        ),
        (
            errors.OfflineModeIsEnabled,
            "is not in the cache, and HF_HUB_OFFLINE is set",
            "unset it, or use a local path",
        ),
    )
    for kind, problem, hint in reasons:
        if any(isinstance(link, kind) for link in chain):
            return HubError(problem, path=what, hint=hint)
    return HubError(
        f"is no local path, and cannot be fetched from the Hub ({_reason(error)})",
        path=what,
        hint="check the network and try again",
    )


def _reason(error: BaseException) -> str:
    """Return the innermost cause in a few words: an HTTP status, or what the system said."""
    while error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"HTTP status {status}"
    return printable(f"{type(error).__name__}: {error}".rstrip(": "))
