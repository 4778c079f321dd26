"""The plan from module deltas to pairs of GGUF tensors.

Most deltas are one pair. Gate and up of fused experts are two pairs with the same A. The
deltas of single experts become one pair with a leading dimension: of the largest rank, with
zeros where an expert has a smaller one or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from struct import pack, unpack

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.tensors.arrays import Array
from loraformat_converters.gguf.architectures import (
    Architecture,
    Config,
    LoraTarget,
    lora_places,
)
from loraformat_converters.gguf.architectures.transforms import HeadOrder
from loraformat_converters.gguf.lora.refusals import (
    refuse_delta,
    refuse_embedding,
    refuse_homeless,
    refuse_vocabulary,
)

__all__ = ["Pair", "choose_alpha", "plan_pairs"]

#: Looked up by llama.cpp without asking the adapter.
_NEVER_ADAPTED = ("position_embd.weight", "token_types.weight")
_SMALLEST_ALPHA = 1e-30


@dataclass(slots=True)
class Pair:
    """``lora_a`` and ``lora_b`` of one GGUF weight; one member, but for single experts' deltas."""

    tensor: str
    members: list[tuple[LoraTarget, LoraDelta]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Of the tensors, which llama.cpp divides alpha by."""
        return max(delta.rank for _, delta in self.members)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """As it is stored: an embedding's A as (vocabulary, r)."""
        place, delta = self.members[0]
        if place.embedding:
            return delta.in_features, self.rank
        return (*self._stack, self.rank, delta.in_features)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """As it is stored."""
        place, delta = self.members[0]
        rows = delta.out_features // (1 if place.half is None else 2)
        return (*self._stack, rows, self.rank)

    @property
    def _stack(self) -> tuple[int, ...]:
        experts = self.members[0][0].experts
        return (experts,) if experts else ()

    def factor(self, delta: LoraDelta, alpha: float) -> float:
        """Return what B must be multiplied by, so that alpha / r times that is the scaling."""
        return delta.scaling * self.rank / alpha

    def a(self) -> Array:
        """Load A as it is stored, in the adapter's own type."""
        place, delta = self.members[0]
        if place.expert is not None:
            return self._stacked(self.a_shape, [delta.a.array() for _, delta in self.members])
        values = delta.a.array()
        return numpy.ascontiguousarray(values.T) if place.embedding else values

    def b(self, alpha: float) -> Array:
        """Load B, its rows in GGUF's order, times its factor: float64, or as it is if that is 1."""
        loaded = []
        for place, delta in self.members:
            values, factor = delta.b.array(), self.factor(delta, alpha)
            values = values if factor == 1 else values.astype(numpy.float64) * factor
            loaded.append(place.to_gguf(values))
        if self.members[0][0].expert is not None:
            return self._stacked(self.b_shape, loaded)
        return loaded[0]

    def _stacked(self, shape: tuple[int, ...], parts: list[Array]) -> Array:
        whole = numpy.zeros(shape, numpy.float64)
        for (place, _), part in zip(self.members, parts, strict=True):
            assert place.expert is not None
            whole[place.expert, : part.shape[0], : part.shape[1]] = part
        return whole

    def release(self) -> None:
        """Give the factors' pages back."""
        for _, delta in self.members:
            delta.a.release()
            delta.b.release()


def plan_pairs(adapter: Adapter, architecture: Architecture, config: Config) -> list[Pair]:
    """Return a pair for every GGUF tensor that an adapter changes; every delta is in one.

    Raises
    ------
    UnsupportedError
        For a delta that llama.cpp cannot apply, or would apply wrongly.
    InputError
        If a delta's shape is not one that the base can have.
    """
    pairs: dict[str, Pair] = {}
    for delta in adapter.deltas.values():
        refuse_delta(delta, adapter, architecture, config)
        places = lora_places(architecture, config, delta.target.removesuffix(".weight"))
        if not places or any(place.tensor in _NEVER_ADAPTED for place in places):
            raise refuse_homeless(delta, adapter, architecture, config)
        for place in places:
            _check(delta, place, adapter)
            refuse_vocabulary(delta, place.tensor, adapter, architecture, config)
            if place.embedding:
                refuse_embedding(delta, adapter, architecture, config)
            pair = pairs.setdefault(place.tensor, Pair(place.tensor))
            _check_member(pair, place, delta, adapter)
            pair.members.append((place, delta))
    return list(pairs.values())


def _check(delta: LoraDelta, place: LoraTarget, adapter: Adapter) -> None:
    stacked, rows = len(delta.a.shape) == 3, delta.out_features
    if stacked != bool(place.experts and place.expert is None):
        problem = f"is of {'many experts' if stacked else 'one matrix'}"
    elif stacked and delta.a.shape[0] != place.experts:
        # llama.cpp does not look at this number, and would write beyond its memory.
        problem = f"is of {delta.a.shape[0]} experts, and the base has {place.experts}"
    elif place.half is not None and rows % 2:
        problem = f"has {rows} rows, which are no two halves"
    elif isinstance(place.rows, HeadOrder) and rows % (2 * place.rows.heads):
        problem = f"has {rows} rows, which are no {place.rows.heads} heads"
    else:
        return
    raise InputError(
        f"the delta of {printable(delta.target)} {problem}",
        path=adapter.path,
        hint="was it made for another base?",
    )


def _check_member(pair: Pair, place: LoraTarget, delta: LoraDelta, adapter: Adapter) -> None:
    if not pair.members:
        return
    single = all(one.expert is not None for one, _ in [*pair.members, (place, delta)])
    twice = any(one.expert == place.expert for one, _ in pair.members)
    if not single or twice:
        raise UnsupportedError(
            f"changes {printable(pair.members[0][1].target)} and {printable(delta.target)}, which "
            f"are one tensor in GGUF ({pair.tensor})",
            path=adapter.path,
        )
    first = pair.members[0][1]
    sizes = (first.in_features, first.out_features)
    if sizes != (delta.in_features, delta.out_features):
        raise InputError(
            f"{printable(first.target)} and {printable(delta.target)} differ in shape",
            path=adapter.path,
        )


def choose_alpha(pairs: Iterable[Pair]) -> float:
    """Return the alpha that leaves as many B as possible as they are.

    That is the most frequent scaling · r that float32 holds exactly; without one the most
    frequent rank, so that the whole scaling is folded into B. Never 0, which llama.cpp takes
    for no scaling at all.
    """
    pairs = list(pairs)
    wanted = Counter(
        delta.scaling * pair.rank for pair in pairs for _, delta in pair.members if delta.scaling
    )
    for alpha, _ in wanted.most_common():
        if _SMALLEST_ALPHA < abs(alpha) < 1e30 and unpack("<f", pack("<f", alpha))[0] == alpha:
            return alpha
    return float(Counter(pair.rank for pair in pairs).most_common(1)[0][0])
