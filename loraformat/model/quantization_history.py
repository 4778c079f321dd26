"""The quantization history of a model's weights.

A model that is quantized a second time is further from its original than a report of that time
can tell, because the original is not at hand. So what is known is passed on: in a bundle as an
extension of its manifest that nobody must understand, in a GGUF file as a value of its head, in
other safetensors files as one of their ``__metadata__``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraformat.storage import strict_json

__all__ = [
    "EXTENSION",
    "Quantized",
    "from_extension",
    "from_metadata",
    "from_text",
    "metadata_of",
    "spelled",
    "to_extension",
    "to_text",
]

#: Name of the extension of a manifest.
EXTENSION = "pypi.org/project/loraformat/quantized-before"
#: Member of the ``__metadata__`` of safetensors files.
_MEMBER = "loraformat.quantized_before"
_MOST_STEPS, _MOST_TYPES, _LONGEST_TEXT = 16, 16, 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_ ]{1,32}")


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantization of the weights.

    Attributes
    ----------
    types : dict of str to int
        How many weights by type: ``NF4``, a GGUF block type's name, ``MXFP4``, ``float8 E4M3``.
    bits_per_weight : float
        Of these weights together.

    Examples
    --------
    >>> str(Quantized({"Q4_K": 144, "Q6_K": 38}, 5.1))
    'Q4_K and Q6_K (182 weights, 5.10 bits each)'
    """

    types: Mapping[str, int]
    bits_per_weight: float

    def __str__(self) -> str:
        *most, last = self.types
        names = f"{', '.join(most)} and {last}" if most else last
        weights = sum(self.types.values())
        return f"{names} ({weights} weights, {self.bits_per_weight:.2f} bits each)"


def spelled(steps: Iterable[Quantized]) -> str:
    """Return all steps as text.

    Examples
    --------
    >>> spelled([Quantized({"Q4_1": 210}, 5.0), Quantized({"NF4": 210}, 4.127)])
    'Q4_1 (210 weights, 5.00 bits each), then NF4 (210 weights, 4.13 bits each)'
    """
    return ", then ".join(map(str, steps))


def to_extension(steps: Iterable[Quantized]) -> dict[str, Any]:
    """Return the history as a manifest extension."""
    return {"must_understand": False, "steps": [asdict(step) for step in steps]}


def to_text(steps: Iterable[Quantized]) -> str:
    """Return the history as a JSON array."""
    return json.dumps([asdict(step) for step in steps])


def from_extension(extensions: Mapping[str, Any]) -> tuple[Quantized, ...]:
    """Parse the extension in an untrusted manifest; empty if its form is unknown."""
    body = extensions.get(EXTENSION)
    return _steps(body.get("steps")) if isinstance(body, dict) else ()


def metadata_of(steps: Iterable[Quantized]) -> dict[str, str]:
    """Return the ``__metadata__`` of a safetensors file; transformers wants the first member."""
    known = list(steps)
    return {"format": "pt"} | ({_MEMBER: to_text(known)} if known else {})


def from_metadata(metadata: Mapping[str, str]) -> tuple[Quantized, ...]:
    """Parse the output of `metadata_of`; empty for anything else."""
    return from_text(metadata.get(_MEMBER, ""))


def from_text(text: str) -> tuple[Quantized, ...]:
    """Parse the output of `to_text`; empty for any other text."""
    if len(text) > _LONGEST_TEXT:
        return ()
    try:
        return _steps(strict_json.loads(text.encode()))
    except (strict_json.StrictJsonError, UnicodeEncodeError):
        return ()


def _steps(found: object) -> tuple[Quantized, ...]:
    if not isinstance(found, list) or not 0 < len(found) <= _MOST_STEPS:
        return ()
    steps = [step for step in map(_step, found) if step is not None]
    return tuple(steps) if len(steps) == len(found) else ()


def _step(found: object) -> Quantized | None:
    if not isinstance(found, dict):
        return None
    types, bits = found.get("types"), found.get("bits_per_weight")
    if not isinstance(types, dict) or not 0 < len(types) <= _MOST_TYPES:
        return None
    if not isinstance(bits, int | float) or not 0 < bits <= 64:
        return None
    counted = all(type(count) is int and 0 < count < 1 << 53 for count in types.values())
    return Quantized(types, float(bits)) if counted and all(map(_NAME.fullmatch, types)) else None
