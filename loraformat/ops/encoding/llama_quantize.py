"""GGUF types that only llama.cpp's ``llama-quantize`` can write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from shlex import join

from loraformat.errors import UsageError

__all__ = ["is_llama_type", "refuse_llama_type"]

#: Its words for types, but for those that are written here.
_WORDS = re.compile(
    r"q2_k(_s)?|q3_k(_[sml])?|q[45]_k(_[sm])?|q6_k|i?q[1-4]_(xxs|xs|nl|s|m)|tq[12]_0|mxfp4_moe"
)


def is_llama_type(word: str) -> bool:
    """Tell whether a type can only be written by ``llama-quantize``.

    Examples
    --------
    >>> is_llama_type("Q4_K_M"), is_llama_type("iq4_xs"), is_llama_type("q8_0")
    (True, True, False)
    """
    return _WORDS.fullmatch(word.lower()) is not None


def refuse_llama_type(dtype: str | None, target: Path, command: Sequence[str]) -> None:
    """Refuse such a type and name the two commands that produce it.

    ``command`` writes a GGUF file of the same model; the output's name and the type are left out.
    """
    if dtype is None or not is_llama_type(dtype):
        return
    out = target if target.suffix == ".gguf" else target.with_name(f"{target.name}.gguf")
    plain = out.with_name(f"{out.stem}-f16.gguf")
    raise UsageError(
        f"{dtype} is a type that llama.cpp's llama-quantize writes from an f16 GGUF file",
        hint=f"run: {join([*command, str(plain), '--dtype', 'f16'])}; then: "
        f"{join(['llama-quantize', str(plain), str(out), dtype.upper()])}",
    )
