"""The arithmetic of undo records in exact fractions, for the test vectors: slow and plain.

It shares no code with the package or with ``spec/miniundo.py``. Numbers are Python floats, which
hold every float32; a sum or product of two rounded by `f32` is what float32 gives.
"""

from __future__ import annotations

import bisect
import math
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from vector_nf4 import f32, pack

#: Numbers of infinity.
INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

Matrix = list[list[float]]


@dataclass
class Delta:
    """One delta of an adapter: B (out, r), A (r, in), or stacks of them."""

    b: list[Any]
    a: list[Any]
    scaling: float = 1.0
    orientation: str = "linear"
    magnitude: list[float] | None = None
    bias: list[float] | None = None
    dtype: str = "F32"


@dataclass
class Term:
    """A term, as the record has it."""

    target: str
    adapter: int = 0
    weight: float = 1.0
    part: str = "delta"
    block: int = 0
    expert: int | None = None
    rows: tuple[int, int] | None = None
    gains: list[float] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Return the members."""
        names = ("adapter", "target", "weight", "part", "block", "expert", "rows")
        return {name: getattr(self, name) for name in names}


def values(data: bytes, dtype: str) -> list[float]:
    """Return the numbers in some bytes."""
    if dtype == "BF16":
        data, dtype = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)), "F32"
    size, letter = (2, "e") if dtype == "F16" else (4, "f")
    return list(struct.unpack(f"<{len(data) // size}{letter}", data))


def number(value: float, dtype: str) -> int:
    """Return the place of a finite value of a dtype."""
    size = 4 if dtype == "F32" else 2
    bits = int.from_bytes(pack([value], dtype), "little")
    sign = bits >> (8 * size - 1)
    return -(bits - (1 << (8 * size - 1))) if sign else bits


def value(place: int, dtype: str) -> float:
    """Return the value at a place."""
    size = 4 if dtype == "F32" else 2
    found = values(abs(place).to_bytes(size, "little"), dtype)[0]
    return -found if place < 0 else found


def _exponent(numbers: list[Fraction]) -> int:
    largest = max(map(abs, numbers), default=Fraction(0))
    if largest == 0:
        return 0
    e = -400
    while largest >= Fraction(2) ** e:
        e += 1
    return e


def _columns(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    return [list(column) for column in zip(*matrix, strict=True)]


def _fixed(rows: list[list[Fraction]], bits: int) -> list[list[Fraction]]:
    made = []
    for row in rows:
        step = Fraction(2) ** (_exponent(row) - bits)
        made.append([round(x / step) * step for x in row])
    return made


def delta_of(
    terms: list[Term], adapters: list[dict[str, Delta]]
) -> tuple[Matrix, list[float] | None, bool]:
    """Return the delta of a matrix, its gains by feature, and whether they run along columns."""
    deltas = [adapters[term.adapter][term.target] for term in terms]
    transposed = deltas[0].orientation == "transposed" and terms[0].part == "delta"
    factors = [_factors(delta, term) for delta, term in zip(deltas, terms, strict=True)]
    count = len(factors[0][0])
    gained = [term for term in terms if term.gains]
    total = [1.0] * count
    for term in gained:
        for j, gain in enumerate(term.gains):
            alone = len(gained) == 1 and term.weight == 1
            total[j] = gain if alone else total[j] + term.weight * (gain - 1)
    gains = [f32(x) for x in total]
    left: list[list[Fraction]] = [[] for _ in range(count)]
    right: list[list[Fraction]] = []
    for term, delta, (b, a) in zip(terms, deltas, factors, strict=True):
        for j in range(count):
            gain = term.gains[j] if term.gains else 1.0
            scale = term.weight * delta.scaling * gain / (gains[j] or math.inf)
            left[j] += [Fraction(x * scale) for x in b[j]]
        right += [[Fraction(x) for x in row] for row in a]
    if transposed:
        left, right = _columns(right), _columns(left)
    rank = len(right)
    for k in range(rank):
        shift = (_exponent([row[k] for row in left]) - _exponent(right[k])) // 2
        for row in left:
            row[k] /= Fraction(2) ** shift
        right[k] = [x * Fraction(2) ** shift for x in right[k]]
    bits = (53 - (rank - 1).bit_length()) // 2
    left, columns = _fixed(left, bits), _fixed(_columns(right), bits)
    product = [
        [f32(float(sum(x * y for x, y in zip(row, col, strict=True)))) for col in columns]
        for row in left
    ]
    return product, gains if gained else None, transposed


def _factors(delta: Delta, term: Term) -> tuple[Matrix, Matrix]:
    if term.part == "bias":
        assert delta.bias is not None
        return [[1.0]], [delta.bias]
    b, a = (delta.b, delta.a) if term.expert is None else (
        delta.b[term.expert], delta.a[term.expert]
    )  # fmt: skip
    return b[slice(*term.rows)] if term.rows else b, a


def merged_value(w: float, d: float, g: float | None, dtype: str) -> float:
    """Return round(g · (w + d))."""
    total = f32(w + d)
    if g is not None:
        total = f32(total * g)
    if dtype == "F16":
        total = max(-65504.0, min(65504.0, total))
    return values(pack([total], dtype), dtype)[0]


def interval(m: float, d: float, g: float | None, source: str, dtype: str) -> tuple[int, int]:
    """Return the first and the last number that merges into `m`."""
    if g is not None and g < 0:
        m, g = -m, -g
    places = range(-INFINITY[source] + 1, INFINITY[source])

    def merged(place: int) -> float:
        return merged_value(value(place, source), d, g, dtype)

    first = bisect.bisect_left(places, m, key=merged)
    last = bisect.bisect_right(places, m, key=merged)
    return places[first], places[last - 1]


def tile_code(
    w: list[float], m: list[float], d: list[float], g: list[float | None], source: str, dtype: str
) -> bytes:
    """Return the code of a tile."""
    code, length = 0, 0
    for one in zip(w, m, d, g, strict=True):
        first, last = interval(*one[1:], source, dtype)
        width = (last - first).bit_length()
        code |= (number(one[0], source) - first) << length
        length += width
    return code.to_bytes((length + 7) // 8, "little")
