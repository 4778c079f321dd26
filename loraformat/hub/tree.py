r"""File listings of Hub commits, and hash comparison.

The Hub lists every file of a commit with a hash: the SHA-256 of a large file (LFS, Xet),
and git's own SHA-1, over ``blob SIZE\0`` and the bytes, of a small one. huggingface_hub
compares sizes only; here the bytes are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from loraformat.version import __version__

__all__ = ["TreeFile", "digest", "from_hash", "hub_client", "list_files"]

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class TreeFile:
    """One file of a commit.

    Attributes
    ----------
    path : str
        In the repository, with ``/``; a stranger's text.
    nbytes : int
    sha256 : str or None
        Of its bytes, if it is a large file.
    git_oid : str
        Git's SHA-1 of its bytes; of a large file, of the pointer to it.
    """

    path: str
    nbytes: int
    sha256: str | None
    git_oid: str

    @property
    def hash(self) -> str:
        """Expected hash: 64 digits for SHA-256, 40 for git's SHA-1."""
        return self.sha256 or self.git_oid


def hub_client() -> Any:
    """Return huggingface_hub's client, which names us to the Hub."""
    from huggingface_hub import HfApi

    return HfApi(library_name="loraformat", library_version=__version__)


def list_files(repo: str, commit: str) -> dict[str, TreeFile]:
    """Return the files of a commit or branch by path, one request per thousand.

    It raises whatever huggingface_hub raises; see `loraformat.hub.explain`.
    """
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: TreeFile(
            entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
        )
        for entry in hub_client().list_repo_tree(repo, revision=commit, recursive=True)
        if isinstance(entry, RepoFile)
    }


def from_hash(path: str, nbytes: int, word: str) -> TreeFile | None:
    """Return a file record from a bare hash; None if the text is not a hash.

    Examples
    --------
    >>> from_hash("config.json", 2, "9" * 40).hash[:4], from_hash("x", 0, "abc")
    ('9999', None)
    """
    if len(word) not in (40, 64) or set(word) - set("0123456789abcdef"):
        return None
    return TreeFile(path, nbytes, word if len(word) == 64 else None, word)


def digest(
    file: BinaryIO, wanted: TreeFile, progress: Callable[[int], None] = lambda nbytes: None
) -> str:
    """Hash an open file, from its beginning, with the Hub's hash for it.

    `progress` is called with the number of bytes of each piece.

    Examples
    --------
    >>> import io
    >>> empty = TreeFile("empty", 0, None, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    >>> digest(io.BytesIO(b""), empty) == empty.hash
    True
    """
    if wanted.sha256 is not None:
        state = hashlib.sha256()
    else:  # git's, which is over a header that names the size, too
        state = hashlib.sha1(f"blob {wanted.nbytes}\0".encode(), usedforsecurity=False)
    while piece := file.read(_PIECE):
        state.update(piece)
        progress(len(piece))
    return state.hexdigest()
