"""Options of ``extract``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loraformat.errors import UsageError

__all__ = ["ExtractOptions"]


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """Options of ``extract``, checked together; `seed` is that of the random start.

    Raises
    ------
    UsageError
        If both rank and energy are given, or one is out of its range.
    """

    rank: int | Literal["auto"] | None = None
    energy: float | None = None
    max_rank: int = 256
    skip: Sequence[str] = ()
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UsageError("give either --rank or --energy, not both")
        if self.rank is None and self.energy is None:
            object.__setattr__(self, "rank", "auto")
        if self.rank != "auto" and self.rank is not None and self.rank < 1:
            raise UsageError("rank is at least 1, or auto")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a fraction above 0 and at most 1, not {self.energy}")
        if self.max_rank < 1:
            raise UsageError("max-rank is at least 1")
