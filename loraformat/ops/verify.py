"""Verification of any format: a bundle against its hashes, others against their own structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraformat import plugins
from loraformat.checkpoint import NF4Tensor
from loraformat.errors import FormatError
from loraformat.hub import resolve
from loraformat.integrity import Finding, verify_bundle
from loraformat.reader import is_bundle

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked.

    Attributes
    ----------
    path, format : str
    tensors : int
        Logical tensors that were looked at.
    hashed : bool
        Whether the format has hashes to compare.
    findings : list of Finding
        Empty if it is sound.
    """

    path: str
    format: str
    tensors: int
    hashed: bool
    findings: list[Finding]


def verify(
    source: str | Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Check a model.

    Parameters
    ----------
    source : str or Path
        A local path or a Hub id.
    progress : callable
        Called with the bytes done and the bytes in total.

    Raises
    ------
    InputError
        If it holds no model at all.
    """
    path = resolve(source).path
    if is_bundle(path):
        return _bundle(path, progress)
    reader = plugins.sniff(path)
    assert reader.read is not None
    count, findings = 0, []
    try:
        with reader.read(path) as checkpoint:
            tensors = list(checkpoint.tensors.values())
            for count, tensor in enumerate(tensors, 1):
                if isinstance(tensor, NF4Tensor):
                    tensor.load()  # which looks at the scales
                    tensor.release()
                progress(count, len(tensors))
    except FormatError as error:
        findings = [Finding(error.rule, error.path or str(path), error.problem)]
    return Verification(str(path), reader.name, count, False, findings)


def _bundle(path: Path, progress: Callable[[int, int], None]) -> Verification:
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    done = tensors = 0

    def count(nbytes: int) -> None:
        nonlocal done, tensors
        done += nbytes
        tensors += 1
        progress(done, total)

    findings = verify_bundle(path, progress=count)
    return Verification(str(path), "loraformat", tensors, True, findings)
