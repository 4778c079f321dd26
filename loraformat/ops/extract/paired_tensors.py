"""Pairing of a fine-tune's tensors with its base's, including tied heads and experts.

Experts may be separate tensors on disk and one parameter in transformers. A delta of such a
parameter is what an adapter of PEFT holds, and what a merge spreads over the tensors again: the
difference is taken of all that makes the parameter up.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraformat.model.base_names import names_of
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.tied_head import HEAD, config_of, tied_embedding
from loraformat.ops.extract.difference import PRECISIONS

__all__ = ["Expert", "Pairs", "Stack", "pairs_of", "stacks_of"]

_Pairs = Sequence[tuple[LazyTensor | None, LazyTensor]]


@dataclass(frozen=True, slots=True)
class Expert:
    """Matrices of one expert in both models, stacked by rows."""

    base: list[LazyTensor]
    tuned: list[LazyTensor]


@dataclass(frozen=True, slots=True)
class Stack:
    """A fused parameter.

    Attributes
    ----------
    name : str
        In transformers' memory.
    experts : list of Expert
    """

    name: str
    experts: list[Expert]

    @property
    def nbytes(self) -> int:
        """Bytes of the fine-tune's tensors."""
        return sum(tensor.nbytes for expert in self.experts for tensor in expert.tuned)


def stacks_of(
    pairs: _Pairs, tuned: Checkpoint, skip: Sequence[str]
) -> tuple[list[Stack], list[tuple[LazyTensor | None, LazyTensor]]]:
    """Split tensors into those of fused parameters and all others.

    A parameter of which a part is new, of another shape, not of real numbers, or to be skipped is
    left to be looked at tensor by tensor.

    Parameters
    ----------
    pairs : sequence of (LazyTensor or None, LazyTensor)
        Of the base and the fine-tune.
    tuned : Checkpoint
    skip : sequence of str
        Globs of tensors to leave out.

    Returns
    -------
    list of Stack
    list of (LazyTensor or None, LazyTensor)
    """
    names = names_of(tuned)
    memory = None if names.as_stored else names.memory
    if memory is None:
        return [], list(pairs)
    usable = {
        after.name: (before, after)
        for before, after in pairs
        if before is not None
        and before.shape == after.shape
        and len(after.shape) == 2
        and {before.dtype, after.dtype} <= PRECISIONS.keys()
        and not any(fnmatch.fnmatchcase(after.name, pattern) for pattern in skip)
    }
    stacks, taken = [], set[str]()
    for name, stored in memory.sources.stacked.items():
        tensors = [tensor for parts in stored for tensor in parts]
        if usable.keys() >= set(tensors) and len(memory.shapes[name]) == 3:
            experts = [
                Expert([usable[part][0] for part in parts], [usable[part][1] for part in parts])
                for parts in stored
            ]
            stacks.append(Stack(name, experts))
            taken.update(tensors)
    return stacks, [(before, after) for before, after in pairs if after.name not in taken]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two models, paired tensor by tensor.

    Attributes
    ----------
    tensors : list of (LazyTensor or None, LazyTensor)
        Of the base and the fine-tune; None for what only the fine-tune has.
    only_base : list of str
    tied : str or None
        The embedding that is the head, too, in both models: what changes it changes the head.
    """

    tensors: list[tuple[LazyTensor | None, LazyTensor]]
    only_base: list[str]
    tied: str | None


def pairs_of(base: Checkpoint, tuned: Checkpoint) -> Pairs:
    """Match two models by name.

    A head that one of them stores and the other has tied to its embedding is compared with
    that embedding.
    """
    one, other = dict(base.tensors), dict(tuned.tensors)
    ties = [tied_embedding(model.tensors, config_of(model)) for model in (base, tuned)]
    if ties[0] is not None and ties[1] is None:
        _show_head(one, ties[0], other)
    elif ties[1] is not None and ties[0] is None:
        _show_head(other, ties[1], one)
    return Pairs(
        [(one.get(name), tensor) for name, tensor in other.items()],
        sorted(one.keys() - other.keys()),
        ties[1] if ties[0] == ties[1] else None,
    )


def _show_head(tied: dict[str, LazyTensor], embedding: str, stored: dict[str, LazyTensor]) -> None:
    for name in stored:
        if name.endswith(HEAD) and name not in tied:
            tied[name] = replace(tied[embedding], name=name)
