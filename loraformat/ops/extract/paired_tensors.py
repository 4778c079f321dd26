"""Pairing of a fine-tune's tensors with its base's, including tied heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loraformat.model import config_json
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.tied_head import HEAD, tied_embedding

__all__ = ["Pairs", "pairs_of"]


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
    ties = _tied(base), _tied(tuned)
    if ties[0] is not None and ties[1] is None:
        _show_head(one, ties[0], other)
    elif ties[1] is not None and ties[0] is None:
        _show_head(other, ties[1], one)
    return Pairs(
        [(one.get(name), tensor) for name, tensor in other.items()],
        sorted(one.keys() - other.keys()),
        ties[1] if ties[0] == ties[1] else None,
    )


def _tied(model: Checkpoint) -> str | None:
    config = config_json.parse(model.config, model.path) if model.config else {}
    return tied_embedding(model.tensors, config)


def _show_head(tied: dict[str, LazyTensor], embedding: str, stored: dict[str, LazyTensor]) -> None:
    for name in stored:
        if name.endswith(HEAD) and name not in tied:
            tied[name] = replace(tied[embedding], name=name)
