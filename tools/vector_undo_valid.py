"""The sound vectors of undo records."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from undo_arithmetic import Delta, Term
from vector_nf4 import pack
from vector_undo import Change, Draft, numbers, table

W, V, NORM = "layers.0.q_proj.weight", "layers.0.v_proj.weight", "norm.weight"
ROWS, COLUMNS = 6, 8


def lora(scale: float = 0.1, rank: int = 2, seed: int = 3, **options: object) -> Delta:
    """Return a delta for a matrix of 6 x 8."""
    b, a = table(ROWS, rank, seed, scale), table(rank, COLUMNS, seed + 1, scale)
    return Delta(b, a, **{"scaling": 2.0, **options})  # type: ignore[arg-type]


def plain(dtype: str = "BF16", target: str | None = None, scale: float = 0.1) -> Draft:
    """Return one changed matrix and one unchanged vector."""
    values = numbers(ROWS * COLUMNS, 1, 0.05)
    values[3:7] = [0.0, -0.0, 1e-7, -1e-7]
    draft = Draft(adapters=[{W: lora(scale)}]).weight(W, dtype, [ROWS, COLUMNS], values)
    draft.weight(NORM, dtype, [4], [1.0, -0.0, 0.5, 2.0])
    draft.changes[W] = Change(terms=[Term(W)], dtype=target)
    if target:
        draft.changes[NORM] = Change(dtype=target)
    return draft


def dora(weight: float = 1.0, orientation: str = "linear") -> Draft:
    """Return a delta with gains, of both signs and zero."""
    draft = plain()
    count = ROWS if orientation == "linear" else COLUMNS
    gains = [1.25, -0.75, 0.0, 1.0, 3.5, 0.9375, -2.0, 1e-3][:count]
    b, a = table(count, 2, 5, 0.1), table(2, ROWS + COLUMNS - count, 6, 0.1)
    delta = Delta(b, a, 0.3, orientation, magnitude=numbers(count, 9))
    draft.adapters, draft.weights = [{W: delta}], [weight]
    draft.changes[W].terms = [Term(W, weight=weight, gains=gains)]
    return draft


def two_adapters() -> Draft:
    """Return the sum of an ordinary delta and one with gains."""
    draft = dora(0.7)
    draft.adapters.append({W: lora(0.2, rank=3, seed=11, dtype="BF16", scaling=1 / 3)})
    for name in ("a", "b"):  # as stored
        nested = getattr(draft.adapters[1][W], name)
        rounded = [[struct.unpack("<f", b"\0\0" + pack([x], "BF16"))[0] for x in row]
                   for row in nested]  # fmt: skip
        setattr(draft.adapters[1][W], name, rounded)
    draft.weights.append(-0.3)
    draft.changes[W].terms.append(Term(W, adapter=1, weight=-0.3))
    return draft


def bias() -> Draft:
    """Return a delta with a bias that changes a vector."""
    draft = plain()
    draft.adapters[0][W].bias = numbers(ROWS, 21, 0.1)
    draft.weight("layers.0.q_proj.bias", "BF16", [ROWS], numbers(ROWS, 22))
    draft.changes["layers.0.q_proj.bias"] = Change(terms=[Term(W, part="bias")])
    return draft


def raw() -> Draft:
    """Return what no interval describes."""
    draft = plain()
    odd = [1.0, math.inf, -math.inf, 2.0]
    data = pack(odd, "BF16") + b"\xc1\x7f"  # a NaN
    draft.original[V] = ("BF16", [5], data)
    draft.changes[V] = Change("raw", merged=("BF16", [5], bytes(10)))
    draft.original["count"] = ("I64", [], bytes([7, *bytes(7)]))
    draft.changes["count"] = Change("raw", merged=("F32", [2], bytes(8)))
    return draft


def rows() -> Draft:
    """Return an embedding of which two rows were replaced, and an untied head."""
    draft = Draft(config='{"tie_word_embeddings": true}')
    values = numbers(20, 31)
    draft.weight("embed.weight", "F16", [5, 4], values)
    changed = values[:4] + [9.0] * 4 + values[8:16] + [-9.0] * 4
    merged = ("F16", [5, 4], pack(changed, "F16"))
    draft.changes["embed.weight"] = Change("rows", rows=[1, 4], merged=merged)
    draft.changes["lm_head.weight"] = Change("new", merged=merged)
    return draft


def experts() -> Draft:
    """Return a stack of matrices, of which two get terms: one expert, part of its rows."""
    stack = [table(ROWS + 2, 2, 41 + e, 0.1) for e in range(2)]
    into = [table(2, COLUMNS, 51 + e, 0.1) for e in range(2)]
    draft = Draft(adapters=[{"experts": Delta(stack, into, 0.5)}])
    draft.weight(V, "BF16", [3, ROWS, COLUMNS], numbers(3 * ROWS * COLUMNS, 61, 0.1))
    draft.changes[V] = Change(
        terms=[
            Term("experts", block=2, expert=1, rows=(2, ROWS + 2)),
            Term("experts", block=0, expert=0, rows=(0, ROWS), weight=2.0),
            Term("experts", block=2, expert=0, rows=(1, ROWS + 1)),
        ]
    )
    return draft


def saturated() -> Draft:
    """Return weights beyond float16."""
    draft = plain("BF16", "F16")
    values = [x * 4e6 for x in numbers(ROWS * COLUMNS, 1, 0.05)]
    return draft.weight(W, "BF16", [ROWS, COLUMNS], values)


def extremes() -> Draft:
    """Return factors of ranks that differ by powers of two, and subnormal weights."""
    draft = plain("F32")
    delta = lora(1.0, rank=3)
    for k, scale in enumerate((2.0**60, 1.0, 2.0**-90)):
        for row in delta.b:
            row[k] *= scale * 2.0**-20
        delta.a[k] = [x / scale for x in delta.a[k]]
    draft.adapters = [{W: delta}]
    values = numbers(ROWS * COLUMNS, 1, 2.0**-140)
    values[:3] = [3.0e38, -3.0e38, 1.0]
    return draft.weight(W, "F32", [ROWS, COLUMNS], values)


def newer() -> Draft:
    """Return a later minor version with a member more."""
    draft = plain()
    draft.members = {"version": "1.7", "colour": ["blue"]}
    return draft


def one_tile() -> Draft:
    """Return a tile that holds everything, and a matrix of one column."""
    draft = plain()
    draft.tile_elements = 2**31 - 1
    draft.weight(V, "BF16", [3, 1], [0.5, -0.25, 3.0])
    draft.adapters[0][V] = Delta(table(3, 1, 71), table(1, 1, 72))
    draft.changes[V] = Change(terms=[Term(V)])
    return draft


def zeros() -> Draft:
    """Return zeros of both signs alone, and an empty and a single number."""
    draft = plain()
    draft.weight(W, "BF16", [ROWS, COLUMNS], [0.0, -0.0] * (ROWS * COLUMNS // 2))
    draft.weight("one", "F32", [], [-0.0]).weight("none", "F32", [0, 3], [])
    draft.changes |= {"one": Change(dtype="BF16"), "none": Change(dtype="BF16")}
    return draft


def valid() -> Iterator[tuple[str, str, Draft]]:
    """Yield name, how it was made, and draft."""
    yield "bf16", "one delta on a bfloat16 matrix with zeros of both signs", plain()
    yield "f16", "the same on float16", plain("F16")
    yield "f32", "the same on float32", plain("F32")
    yield (
        "f32-to-bf16",
        "float32 merged into bfloat16, and a vector cast: wide ranks",
        plain("F32", "BF16"),
    )
    yield "bf16-to-f32", "bfloat16 merged into float32: no ranks at all", plain("BF16", "F32")
    yield "f16-to-bf16", "float16 merged into bfloat16", plain("F16", "BF16")
    yield "f16-saturated", "bfloat16 merged into float16, beyond its range", saturated()
    yield "large-delta", "a delta of a thousand times the weights", plain(scale=20.0)
    yield "extremes", "ranks that need balancing, subnormal and huge weights", extremes()
    yield "dora", "a gain per row: negative, zero, large", dora()
    yield "dora-weighted", "a gain per row, merged with the weight 0.7", dora(0.7)
    yield (
        "dora-transposed",
        "a gain per column of a matrix stored as (in, out)",
        dora(1.0, "transposed"),
    )
    yield (
        "two-adapters",
        "a delta with gains and one of bfloat16, weights 0.7 and -0.3",
        (two_adapters()),
    )
    yield "bias", "a delta's bias, added to a vector", bias()
    yield "experts", "a stack of matrices with terms of single experts and rows", experts()
    yield "raw", "tensors stored as they are: not finite; another dtype and shape", raw()
    yield "rows", "replaced rows, a tensor made by the merge, a config", rows()
    yield "one-tile", "the largest tiles, and a matrix of one column", one_tile()
    yield "zeros", "nothing but zeros; a single number and an empty matrix", zeros()
    yield "newer-minor", "version 1.7 with a member that 1.0 does not have", newer()
