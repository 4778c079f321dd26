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
Rules ``L03`` to ``L06`` of ``spec/loraformat-1.0.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraformat.families.tensor_names import layer_of, natural
from loraformat.model.checkpoint import LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4_PARTS
from loraformat.tensors.header import Entry

__all__ = [
    "DEFAULT_SHARD_LIMIT",
    "TAIL_SUFFIXES",
    "Placed",
    "Unit",
    "body_order",
    "execution_units",
    "plan_shards",
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

    Parameters
    ----------
    tensors : iterable of LazyTensor

    Returns
    -------
    list of Unit
        Layers of one stem in ascending order.
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
    before = [Unit(None, (tensor,)) for tensor in single if rank(tensor) == 0]
    after = [Unit(None, (tensor,)) for tensor in single if rank(tensor) > 0]
    middle = [
        Unit(key, tuple(sorted(layers[key], key=lambda tensor: natural(tensor.name))))
        for key in stems
    ]
    return before + middle + after


def plan_shards(units: Sequence[Unit], limit: int) -> list[list[LazyTensor]]:
    """Distribute units over shards.

    A unit is never split, unless it is larger than the limit: then it is split between
    tensors. A tensor is never split.

    Parameters
    ----------
    units : sequence of Unit
        In execution order.
    limit : int
        Body bytes per shard.

    Returns
    -------
    list of list of LazyTensor
        The tensors of each shard, in execution order; at least one shard.
    """
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for unit in units:
        whole = unit.nbytes <= limit
        pieces: Iterable[tuple[LazyTensor, ...]] = (
            [unit.tensors] if whole else [(tensor,) for tensor in unit.tensors]
        )
        for piece in pieces:
            size = sum(tensor.nbytes for tensor in piece)
            if shards[-1] and filled + size > limit:
                shards.append([])
                filled = 0
            shards[-1].extend(piece)
            filled += size
    return shards


@dataclass(frozen=True, slots=True)
class Placed:
    """One placed stored tensor: its weight and its header entry."""

    owner: str
    suffix: str
    entry: Entry


def _body_pieces(
    tensors: Sequence[LazyTensor],
) -> Iterator[tuple[str, str, str, tuple[int, ...], int]]:
    for tensor in tensors:
        if isinstance(tensor, NF4Tensor):
            for part in tensor.parts(0):
                if part.suffix not in TAIL_SUFFIXES:
                    yield tensor.name, part.suffix, part.dtype, part.shape, part.nbytes
        else:
            yield tensor.name, "", tensor.dtype, tensor.shape, tensor.nbytes


def body_order(tensors: Sequence[LazyTensor]) -> list[Placed]:
    """Order the body of a shard.

    Parameters
    ----------
    tensors : sequence of LazyTensor
        One shard's, in execution order.

    Returns
    -------
    list of Placed
        In the order of their bytes, from data byte 0.
    """
    placed: list[Placed] = []
    position = 0
    for run in _runs(tensors):
        pieces = sorted(_body_pieces(run), key=lambda p: (-_alignment(p[4]), natural(p[0] + p[1])))
        for owner, suffix, dtype, shape, nbytes in pieces:
            entry = Entry(owner + suffix, dtype, shape, position, position + nbytes)
            placed.append(Placed(owner, suffix, entry))
            position += nbytes
    return placed


def _alignment(nbytes: int) -> int:
    """Largest power of two, up to 64, that divides a size."""
    return min(nbytes & -nbytes, _ALIGNMENT) if nbytes else _ALIGNMENT


def _runs(tensors: Sequence[LazyTensor]) -> Iterator[list[LazyTensor]]:
    run: list[LazyTensor] = []
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if run and (layer is None or layer != layer_of(run[-1].name)):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def tail_order(
    tensors: Sequence[LazyTensor], quant_state_bytes: Mapping[str, int], position: int
) -> list[Placed]:
    """Order the tail of a shard.

    Parameters
    ----------
    tensors : sequence of LazyTensor
        One shard's, in execution order.
    quant_state_bytes : mapping of str to int
        Length of each NF4 weight's JSON text.
    position : int
        Data byte at which the body ends.
    """
    quantized = [tensor for tensor in tensors if isinstance(tensor, NF4Tensor)]
    placed: list[Placed] = []
    for suffix in TAIL_SUFFIXES:
        for tensor in quantized:
            for part in tensor.parts(quant_state_bytes[tensor.name]):
                if part.suffix == suffix:
                    entry = Entry(
                        tensor.name + suffix,
                        part.dtype,
                        part.shape,
                        position,
                        position + part.nbytes,
                    )
                    placed.append(Placed(tensor.name, suffix, entry))
                    position += part.nbytes
    return placed
