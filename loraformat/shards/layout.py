r"""Tensor layout: execution order, shards, byte offsets.

A shard is a *body*, which is all that computing needs, and a *tail* with the constant
maps and the quant states, which a reader looks at once, when it opens the file:

::

    header | embedding | layer 0 | layer 1 | ...   | quant maps | nested maps | quant states
             \______________ body ______________/    \_______________ tail _______________/

Inside a layer, tensors are sorted by how well their size keeps alignment, so that no
padding is needed (safetensors forbids holes) and each packed weight still begins on a
64-byte boundary whenever the sizes allow. A layer is one contiguous range of the body:
one read brings it in. This module computes; it reads and writes nothing.
Rules ``L03`` to ``L06`` of ``spec/loraformat-1.1.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from loraformat.families.tensor_names import layer_of, natural
from loraformat.model.checkpoint import LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4_PARTS, Part
from loraformat.tensors.header import Entry

__all__ = [
    "DEFAULT_SHARD_LIMIT",
    "TAIL_SUFFIXES",
    "Placed",
    "Unit",
    "body_order",
    "execution_units",
    "plan_shards",
    "shard_name",
    "tail_order",
]

#: Bytes of body per shard unless the user asks otherwise.
DEFAULT_SHARD_LIMIT = 2_000_000_000
#: Parts of an NF4 weight that lie in the tail, in the order in which they lie there.
TAIL_SUFFIXES = (NF4_PARTS["quant_map"], NF4_PARTS["nested_quant_map"], NF4_PARTS["quant_state"])

_ALIGNMENT = 64
_FIRST = re.compile(r"embed|\b(wte|wpe)\b|embeddings")
_LAST = re.compile(r"(lm_head|embed_out|score|classifier|output)\b")
_TOWER = re.compile(r"vision|visual|audio|image|encoder")


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that stay in one shard if they fit: a layer, or a single tensor outside layers."""

    layer: tuple[str, int] | None
    tensors: tuple[LazyTensor, ...]

    @property
    def nbytes(self) -> int:
        """Body bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def execution_units(tensors: Iterable[LazyTensor]) -> list[Unit]:
    """Sort tensors into units in execution order: embeddings, layers, the rest, the head.

    Layers of one stem are in ascending order.
    """
    layers: dict[tuple[str, int], list[LazyTensor]] = {}
    single: list[LazyTensor] = []
    for tensor in tensors:
        key = layer_of(tensor.name)
        (single if key is None else layers.setdefault(key, [])).append(tensor)

    def rank(tensor: LazyTensor) -> int:
        if _LAST.search(tensor.name):
            return 2
        return 0 if _FIRST.search(tensor.name) else 1

    single.sort(key=lambda tensor: (rank(tensor), natural(tensor.name)))
    stems = sorted(layers, key=lambda key: (not _TOWER.search(key[0]), key[0], key[1]))
    middle = [
        Unit(key, tuple(sorted(layers[key], key=lambda tensor: natural(tensor.name))))
        for key in stems
    ]
    embeddings = sum(rank(tensor) == 0 for tensor in single)
    outside = [Unit(None, (tensor,)) for tensor in single]
    return outside[:embeddings] + middle + outside[embeddings:]


def plan_shards(units: Sequence[Unit], limit: int) -> list[list[LazyTensor]]:
    """Distribute units, in execution order, over shards of at most so many body bytes.

    A unit is never split, unless it is larger than the limit: then it is split between tensors. A
    tensor is never split. There is at least one shard.
    """
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for unit in units:
        single = [(tensor,) for tensor in unit.tensors]
        for piece in [unit.tensors] if unit.nbytes <= limit else single:
            size = sum(tensor.nbytes for tensor in piece)
            if shards[-1] and filled + size > limit:
                shards.append([])
                filled = 0
            shards[-1].extend(piece)
            filled += size
    return shards


def shard_name(number: int, count: int) -> str:
    """Return the file name of a shard, counted from 0.

    Examples
    --------
    >>> shard_name(0, 3)
    'model-00001-of-00003.safetensors'
    """
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Placed:
    """One placed stored tensor: its weight and its header entry."""

    owner: str
    suffix: str
    entry: Entry


def _placed(pieces: Iterable[tuple[str, Part]], position: int) -> list[Placed]:
    """Place parts, each with the name of its weight, one behind the other from a data byte on."""
    placed = []
    for owner, part in pieces:
        end = position + part.nbytes
        entry = Entry(owner + part.suffix, part.dtype, part.shape, position, end)
        placed.append(Placed(owner, part.suffix, entry))
        position = end
    return placed


def body_order(tensors: Iterable[LazyTensor]) -> list[Placed]:
    """Order the body of a shard, whose tensors are given in execution order.

    The result is in the order of the bytes, from data byte 0.
    """
    pieces: list[tuple[str, Part]] = []
    # A layer is sorted as a whole; a tensor outside of layers stays where it is.
    for _, run in groupby(enumerate(tensors), lambda one: layer_of(one[1].name) or one[0]):
        parts = [(tensor.name, part) for _, tensor in run for part in _body_parts(tensor)]
        parts.sort(key=lambda p: (-_alignment(p[1].nbytes), natural(p[0] + p[1].suffix)))
        pieces += parts
    return _placed(pieces, 0)


def _body_parts(tensor: LazyTensor) -> list[Part]:
    if isinstance(tensor, NF4Tensor):
        return [part for part in tensor.parts(0) if part.suffix not in TAIL_SUFFIXES]
    return [Part("", tensor.dtype, tensor.shape)]


def _alignment(nbytes: int) -> int:
    """Largest power of two, up to 64, that divides a size."""
    return min(nbytes & -nbytes, _ALIGNMENT) if nbytes else _ALIGNMENT


def tail_order(
    tensors: Sequence[LazyTensor], quant_state_bytes: Mapping[str, int], position: int
) -> list[Placed]:
    """Order the tail of a shard, whose tensors are given in execution order.

    Parameters
    ----------
    quant_state_bytes : mapping of str to int
        Length of each NF4 weight's JSON text.
    position : int
        Data byte at which the body ends.
    """
    pieces = [
        (tensor.name, part)
        for suffix in TAIL_SUFFIXES
        for tensor in tensors
        if isinstance(tensor, NF4Tensor)
        for part in tensor.parts(quant_state_bytes[tensor.name])
        if part.suffix == suffix
    ]
    return _placed(pieces, position)
