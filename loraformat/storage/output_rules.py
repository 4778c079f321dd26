"""Rules that protect existing files from being overwritten."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loraformat.errors import OutputError
from loraformat.storage.durable import identity

__all__ = ["holds_weights", "refuse_existing", "refuse_existing_file", "refuse_input_as_output"]

#: A directory of these is a model, so that a work directory of ours can be told from a stranger's.
_WEIGHTS = ("*.safetensors", "*.gguf")
_ANOTHER = "choose another output"


def refuse_input_as_output(target: Path, work: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is an input, by path, symbolic link or hard link.

    Nor may the directory `work` be one, in which the output is prepared.
    """
    real_target, real_work = target.resolve(), work.resolve()
    for source in inputs:
        real = source.resolve()
        if _same_file(real_target, real) or real.is_relative_to(real_target):
            raise OutputError("is or contains the input", path=target, hint=_ANOTHER)
        if real.is_dir() and real_target.is_relative_to(real):
            raise OutputError("lies inside the input", path=target, hint=_ANOTHER)
        if _same_file(real_work, real) or real.is_relative_to(real_work):
            raise OutputError(
                "is or contains the input, but is needed to prepare this output",
                path=work,
                hint=_ANOTHER,
            )
    if target.is_dir():
        identities = {identity(path) for path in inputs if path.is_file()}
        for path in target.iterdir():
            if path.is_file() and identity(path) in identities:
                raise OutputError(
                    f"holds {path.name}, which is a link to an input file",
                    path=target,
                    hint=_ANOTHER,
                )


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse an existing target, unless it is a model and ``force`` is set."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        kind = "is a symbolic link" if target.is_symlink() else "exists and is not a directory"
        raise OutputError(kind, path=target, hint=_ANOTHER)
    if os.path.ismount(target):
        raise OutputError(
            "is a mount point, which cannot be replaced as a whole",
            path=target,
            hint="name a directory inside it",
        )
    if not any(target.iterdir()):
        return
    if not force:
        raise OutputError("already exists", path=target, hint="use --force to replace it")
    if not holds_weights(target):
        raise OutputError(
            "is a directory without weights and will not be replaced",
            path=target,
            hint="remove it yourself, or choose another output",
        )
    if adapters := sorted(path.name for path in target.glob("adapters/[!.]*")):
        raise OutputError(
            f"holds adapters that would be lost: {', '.join(adapters)}",
            path=target,
            hint="move them away, or choose another output",
        )


def refuse_existing_file(target: Path, *, force: bool) -> None:
    """Refuse to replace an existing file unless it contains weights and ``force`` is set."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_file():
        kind = "is a symbolic link" if target.is_symlink() else "exists and is not a file"
        raise OutputError(kind, path=target, hint=_ANOTHER)
    if not force:
        raise OutputError("already exists", path=target, hint="use --force to replace it")
    if target.stat().st_size and not any(target.match(pattern) for pattern in _WEIGHTS):
        raise OutputError(
            "does not have the name of a weight file and will not be replaced",
            path=target,
            hint="remove it yourself, or choose another output",
        )


def holds_weights(path: Path) -> bool:
    """Tell whether a directory contains weights."""
    return any(any(path.glob(pattern)) for pattern in _WEIGHTS)


def _same_file(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and os.path.samefile(one, other))
