"""Options of ``combine``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from loraformat.errors import UsageError

__all__ = ["EXACT", "METHODS", "CombineOptions", "Method"]

Method = Literal["svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)
#: Methods whose result is the weighted sum, or its best approximation.
EXACT = ("svd", "cat", "linear")


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """How to combine; the options of `combine`, checked together.

    For ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` see
    `loraformat.algebra.interference`; their result has full rank and is approximated.
    """

    method: Method = "svd"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}, wanted one of {', '.join(METHODS)}")
        if self.method == "cat" and self.rank is not None:
            raise UsageError("cat keeps every rank; use svd to choose one")
        if self.rank is not None and self.rank < 1:
            raise UsageError("rank is at least 1")
        if not 0 < self.density <= 1:
            raise UsageError(f"density is a fraction above 0 and at most 1, not {self.density}")
