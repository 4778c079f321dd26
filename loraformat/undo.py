"""The undo record: what rounding loses in a merge, so that the original comes back exactly.

A merge is a monotone function of each weight, f(w) = round(g · (w + d)), see
`loraformat.fixed_point`. Number the finite values of w's dtype by order (both zeros are
number 0). Given the merged value M, the delta d and the gain g, the numbers with
f(w) = M are an interval [a, b]. If it holds one number, nothing need be stored; else the
rank w − a, in ⌈log₂(b − a + 1)⌉ bits. For a delta of 1 % of a bfloat16 weight's norm that
is 0.03 bits per weight, and no code needs fewer: it is just what was lost.

The interval is found by bisection on the numbers, evaluating f itself, so no property of
rounding is assumed but that it is monotone. Negative gains are turned: f(w) = M is
round(−g · (w + d)) = −M. Negative zeros are listed by position. Tensors for which this
cannot work (NaN, infinity, many negative zeros) are stored as they are.

A record is a safetensors file: its ``__metadata__`` has one member, ``loraformat.undo``, a
JSON text. ``spec/undo-1.0.md`` has the rules, ``U01`` to ``U09``. Nothing here reads files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import numpy
import torch

from loraformat import strict_json
from loraformat.errors import FormatError
from loraformat.fixed_point import merge_values
from loraformat.header import Entry, encode_header

__all__ = [
    "FORMULA",
    "METADATA_KEY",
    "AdapterRecord",
    "UndoRecord",
    "UndoTensor",
    "Unmergeable",
    "decode_tile",
    "encode_record",
    "encode_tile",
    "parse_record",
    "part_names",
]

#: Name of the arithmetic; another one gets another name.
FORMULA = "fixed-point-1"
METADATA_KEY = "loraformat.undo"

_VERSION = "1.0"
_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
#: Number of infinity: all finite values have smaller ones.
_INFINITY = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


class Unmergeable(Exception):
    """A tile that no interval describes; its tensor is stored as it is."""


# --- Numbers of floating-point values -------------------------------------------------------


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """Return the place of each value in the order of its dtype, as int32; zeros are 0."""
    bits = values.contiguous().view(_INTEGERS[values.dtype]).int()
    low = torch.iinfo(_INTEGERS[values.dtype]).min
    return torch.where(bits >= 0, bits, low - bits)


def _values(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values at these places."""
    low = torch.iinfo(_INTEGERS[dtype]).min
    bits = torch.where(numbers >= 0, numbers, low - numbers)
    return bits.to(_INTEGERS[dtype]).view(dtype)


# --- Intervals --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tile:
    """Flat operands of one tile, turned so that every gain is positive or zero."""

    delta: torch.Tensor
    gain: torch.Tensor | None
    merged: torch.Tensor
    numbers: torch.Tensor
    dtype: torch.dtype

    def at(self, index: torch.Tensor) -> _Tile:
        """Return some elements."""
        gain = None if self.gain is None else self.gain[index]
        return _Tile(self.delta[index], gain, self.merged[index], self.numbers[index], self.dtype)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the number of f(w), for the number of w."""
        weight = _values(numbers, self.dtype)
        return _numbers(merge_values(weight, self.delta, self.gain, self.merged.dtype))


def _tile(
    merged: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, dtype: torch.dtype
) -> _Tile:
    flat = merged.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise Unmergeable
    each = delta.expand_as(merged).reshape(-1)
    if gain is None:
        return _Tile(each, None, flat, _numbers(flat), dtype)
    gains = gain.expand_as(merged).reshape(-1)
    flat = torch.where(gains < 0, -flat, flat)
    return _Tile(each, gains.abs(), flat, _numbers(flat), dtype)


def _guess(tile: _Tile) -> torch.Tensor:
    """Return the number of a value near those that merge into M."""
    near = tile.merged.float()
    if tile.gain is not None:
        near = near / tile.gain
    limit = torch.finfo(tile.dtype).max
    near = (near - tile.delta).nan_to_num(0.0, limit, -limit).clamp(-limit, limit)
    return _numbers(near.to(tile.dtype))


def _intervals(tile: _Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one number for every element, and where the interval holds more: index, a, count.

    Most intervals hold one number, the guess, whose neighbours merge into something else; only
    the others are bisected.
    """
    top = _INFINITY[tile.dtype] - 1
    guess = _guess(tile)
    below = tile.forward((guess - 1).clamp(min=-top)) < tile.numbers
    above = tile.forward((guess + 1).clamp(max=top)) > tile.numbers
    alone = below & above & (tile.forward(guess) == tile.numbers)
    index = torch.nonzero(~alone).view(-1)
    some = tile.at(index)
    first = _bisect(some, top, strict=False)
    last = _bisect(some, top, strict=True) - 1
    if bool((last < first).any()):
        raise Unmergeable
    guess[index] = first
    return guess, index, first.long(), last.long() - first.long() + 1


def _bisect(tile: _Tile, top: int, *, strict: bool) -> torch.Tensor:
    """Return the least number with f ≥ M, or f > M if strict; top + 1 if there is none."""
    low = torch.full_like(tile.numbers, -top)
    high = torch.full_like(tile.numbers, top + 1)
    for _ in range((2 * top + 1).bit_length()):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        found = tile.forward(middle.clamp(max=top))
        right = found > tile.numbers if strict else found >= tile.numbers
        right |= middle > top
        high = torch.where(right, middle, high)
        low = torch.where(right, low, (middle + 1).clamp(max=top + 1))
        low = torch.minimum(low, high)
    return high


def _widths(counts: torch.Tensor) -> numpy.ndarray[Any, Any]:
    """Return ⌈log₂ count⌉ of each count."""
    exponents = torch.frexp((counts - 1).double()).exponent
    return exponents.long().numpy()


def encode_tile(
    weight: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, merged: torch.Tensor
) -> tuple[bytes, torch.Tensor]:
    """Return what is lost of a tile.

    Parameters
    ----------
    weight : torch.Tensor
        The original.
    delta, gain
        As in `loraformat.fixed_point.merge_values`.
    merged : torch.Tensor
        Its result.

    Returns
    -------
    bits : bytes
        The ranks, each in as many bits as its interval needs, lowest bit first; whole bytes.
    zeros : torch.Tensor
        int64 positions of negative zeros in the flat tile.

    Raises
    ------
    Unmergeable
        If the tile cannot be restored from these.

    Examples
    --------
    >>> weight = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    >>> delta = torch.full((2,), 300.0)
    >>> merged = merge_values(weight, delta, None, torch.bfloat16)
    >>> bits, zeros = encode_tile(weight, delta, None, merged)
    >>> torch.equal(decode_tile(merged, delta, None, torch.bfloat16, bits), weight)
    True
    """
    flat = weight.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise Unmergeable
    tile = _tile(merged, delta, gain, weight.dtype)
    exact, index, first, counts = _intervals(tile)
    numbers = _numbers(flat)
    ranks = numbers[index] - first
    exact[index] = numbers[index]
    if bool((ranks < 0).any() | (ranks >= counts).any()) or not torch.equal(exact, numbers):
        raise Unmergeable
    zeros = torch.nonzero((flat == 0) & torch.signbit(flat)).view(-1)
    return _pack(ranks.numpy(), _widths(counts)), zeros


def decode_tile(
    merged: torch.Tensor,
    delta: torch.Tensor,
    gain: torch.Tensor | None,
    dtype: torch.dtype,
    bits: bytes | memoryview,
) -> torch.Tensor:
    """Return the original tile, without the signs of zeros.

    Parameters
    ----------
    merged, delta, gain
        As in `encode_tile`.
    dtype : torch.dtype
        Of the original.
    bits : bytes
        The tile's.

    Raises
    ------
    Unmergeable
        If the bits do not belong to it.
    """
    tile = _tile(merged, delta, gain, dtype)
    numbers, index, first, counts = _intervals(tile)
    widths = _widths(counts)
    needed = (int(widths.sum()) + 7) // 8
    if needed != len(bits):
        raise Unmergeable
    ranks = torch.from_numpy(_unpack(bits, widths))
    if bool((ranks >= counts).any()):
        raise Unmergeable
    numbers[index] = (first + ranks).int()
    return _values(numbers, dtype).view(merged.shape)


def _places(widths: numpy.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Return of every bit the field it belongs to, and its place in it."""
    owner = numpy.repeat(numpy.arange(len(widths)), widths)
    begins = numpy.cumsum(widths) - widths
    return owner, numpy.arange(len(owner)) - begins[owner]


def _pack(values: numpy.ndarray[Any, Any], widths: numpy.ndarray[Any, Any]) -> bytes:
    owner, place = _places(widths)
    return numpy.packbits((values[owner] >> place) & 1, bitorder="little").tobytes()


def _unpack(bits: bytes | memoryview, widths: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    owner, place = _places(widths)
    flat = numpy.unpackbits(numpy.frombuffer(bits, numpy.uint8), bitorder="little")
    values = numpy.zeros(len(widths), numpy.int64)
    numpy.add.at(values, owner, flat[: len(owner)].astype(numpy.int64) << place)
    return values


# --- The record -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter that was merged: where it was, a hash over what it adds, its weight."""

    path: str
    sha256: str
    weight: float


@dataclass(frozen=True, slots=True)
class UndoTensor:
    """How to restore one tensor.

    Attributes
    ----------
    mode : {"interval", "raw", "rows", "new"}
        Ranks of intervals; the original bytes; the original bytes of some rows; nothing: the
        tensor was made by the merge.
    dtype, shape
        Of the original.
    sha256, merged_sha256 : str
        Before and after the merge; of a new tensor the first is empty.
    terms : list of dict
        What was added, see `loraformat.ops.edits.Term`.
    rows : list of int
        Of mode "rows".
    """

    mode: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    merged_sha256: str
    terms: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UndoRecord:
    """Everything that undoing one merge needs, but the adapters and the merged model.

    Attributes
    ----------
    created_by : str
    tile_elements : int
        Elements of a tile.
    adapters : list of AdapterRecord
    tensors : dict of str to UndoTensor
        By name; of those that the merge changed.
    unchanged : dict of str to str
        SHA-256 of the others.
    config : str or None
        ``config.json`` of the original.
    """

    created_by: str
    tile_elements: int
    adapters: list[AdapterRecord]
    tensors: dict[str, UndoTensor]
    unchanged: dict[str, str]
    config: str | None = None


def encode_record(record: UndoRecord, parts: Mapping[str, int]) -> tuple[bytes, list[Entry]]:
    """Return the header of a record's file.

    Parameters
    ----------
    record : UndoRecord
    parts : mapping of str to int
        Bytes of each stored part, by name, in order.

    Returns
    -------
    header : bytes
    entries : list of Entry
        Where the parts lie.
    """
    entries, position = [], 0
    for name, nbytes in parts.items():
        entries.append(Entry(name, "U8", (nbytes,), position, position + nbytes))
        position += nbytes
    text = json.dumps({"version": _VERSION, "formula": FORMULA, **asdict(record)})
    return encode_header(entries, {METADATA_KEY: text}), entries


def parse_record(metadata: Mapping[str, str], path: str | PathLike[str]) -> UndoRecord:
    """Return the record in a header's metadata.

    Raises
    ------
    FormatError
        U01 to U03.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise FormatError("U01", "is not an undo record", path=path)
    try:
        members = strict_json.loads(text.encode())
        version, formula = members.pop("version"), members.pop("formula")
        if str(version).split(".")[0] != "1" or formula != FORMULA:
            raise FormatError(
                "U02",
                f"is an undo record of version {version}, formula {formula}; "
                f"wanted 1.x and {FORMULA}",
                path=path,
                hint="update loraformat",
            )
        tensors = {
            name: UndoTensor(**{**fields, "shape": tuple(fields["shape"])})
            for name, fields in members.pop("tensors").items()
        }
        adapters = [AdapterRecord(**fields) for fields in members.pop("adapters")]
        return UndoRecord(tensors=tensors, adapters=adapters, **members)
    except (strict_json.StrictJsonError, TypeError, KeyError, AttributeError) as error:
        raise FormatError("U03", f"its text is malformed: {error}", path=path) from None


def part_names(name: str) -> tuple[str, str, str, str]:
    """Return the names of a tensor's stored parts.

    The residual, all tiles' one after the other; int64 positions of -0.0; float32 gains;
    int64 lengths of the tiles' residuals.
    """
    return f"{name}.residual", f"{name}.zeros", f"{name}.gains", f"{name}.lengths"
