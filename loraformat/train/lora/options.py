"""What of a model is trained, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.errors import UsageError

__all__ = ["INITIALISATIONS", "LoraOptions"]

#: Words for `LoraOptions.init`.
INITIALISATIONS = ("kaiming", "gaussian", "orthogonal", "pissa", "loftq")

_MAX_RANK = 16384


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What of a model is trained, and how it begins.

    Attributes
    ----------
    rank : int
        Of every module that `ranks` does not name.
    alpha : float or None
        α: a module's delta is scaled by α/r, by α/√r with `rslora`, r its own rank. None takes
        the module's rank, so that the scaling is 1, or √r with `rslora`.
    rslora : bool
        Rank-stabilised scaling (Kalajdzievski 2023).
    targets : tuple of str
        ``all-linear`` (every linear of the decoder layers, fused experts too; but none whose
        weight several layers share), ``attention``, ``mlp``, names of modules or their last parts,
        globs of either.
    ranks : mapping of str to int
        Ranks by name or glob, as in `targets`; of several that match the last one wins.
    dropout : float
        Share of the inputs of A that are zeroed in training, 0 to below 1.
    init : str
        ``kaiming``, ``gaussian`` or ``orthogonal``: the model begins as the base. ``pissa``: too,
        with the base's principal directions as factors. ``loftq``: it begins nearer to the model
        that the base was quantized from.
    dora : bool
        Weight-decomposed (Liu 2024): a trained magnitude for each output feature.
    embeddings : bool
        Train a delta of the token embeddings, too.
    head : bool
        Train a delta of the output head, too.
    seed : int
        Of the factors' beginning, and of nothing else.
    statistics : bool
        Collect the second moments of A x on the way, for `loraformat.reduce`.

    Raises
    ------
    UsageError
        If one is out of its range.

    Examples
    --------
    >>> LoraOptions(rank=8, alpha=16).scaling(8), LoraOptions(rank=8).scaling(8)
    (2.0, 1.0)
    >>> LoraOptions(rank=4, alpha=8, rslora=True).scaling(4)
    4.0
    """

    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    ranks: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    init: str = "kaiming"
    dora: bool = False
    embeddings: bool = False
    head: bool = False
    seed: int = 0
    statistics: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise UsageError(
                f"targets is the word {self.targets!r}, wanted several", hint="give a tuple"
            )
        for what, rank in (("rank", self.rank), *(("rank of " + k, r) for k, r in self.named())):
            if not 1 <= rank <= _MAX_RANK:
                raise UsageError(f"{what} is {rank}, wanted 1 to {_MAX_RANK}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"alpha is {self.alpha}, wanted a number above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}, wanted a share from 0 to below 1")
        if self.init not in INITIALISATIONS:
            words = ", ".join(INITIALISATIONS)
            raise UsageError(f"init is {self.init!r}, wanted one of {words}")
        if not self.targets and not (self.embeddings or self.head):
            raise UsageError("targets names nothing to train", hint="give all-linear")

    def named(self) -> tuple[tuple[str, int], ...]:
        """Return `ranks` as pairs."""
        return tuple(self.ranks.items())

    def scaling(self, rank: int) -> float:
        """Return what B A is multiplied by in a module of a rank: α/r, or α/√r."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)
