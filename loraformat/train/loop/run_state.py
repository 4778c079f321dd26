"""Where a run stands: what a checkpoint holds besides tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loraformat.errors import InputError

__all__ = ["RunState"]


@dataclass(slots=True)
class RunState:
    """Counts and losses at the end of a step.

    Attributes
    ----------
    step : int
        Steps made.
    cursor : dict
        Place in the data, as its cursor writes it; empty at the start.
    tokens, trained : int
        Tokens seen, and those of them that were learned, on all ranks.
    evaluated : int
        The last step after which held-out loss was measured, -1 before the first.
    first_loss, last_loss : float or None
        Mean loss per learned token in the first and in the last step.
    first_eval, best_eval, last_eval : float or None
        Held-out losses, where measured.
    best_step : int or None
        The step of the lowest held-out loss.
    stale : int
        Evaluations since then.
    seconds : float
        Time that was spent, over all starts of this run.

    Examples
    --------
    >>> state = RunState()
    >>> [state.take_evaluation(loss) for loss in (2.0, 1.5, 1.75)], state.stale
    ([True, True, False], 1)
    >>> RunState.from_json(state.to_json()) == state
    True
    """

    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    trained: int = 0
    evaluated: int = -1
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval: float | None = None
    best_eval: float | None = None
    last_eval: float | None = None
    best_step: int | None = None
    stale: int = 0
    seconds: float = 0.0

    def take_step(self, loss: float, trained: int, tokens: int) -> None:
        """Count one step."""
        self.step += 1
        self.trained += trained
        self.tokens += tokens
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss

    def take_evaluation(self, loss: float) -> bool:
        """Count one evaluation and tell whether it is the best so far."""
        self.evaluated = self.step
        self.first_eval = loss if self.first_eval is None else self.first_eval
        self.last_eval = loss
        better = math.isfinite(loss) and (self.best_eval is None or loss < self.best_eval)
        if better:
            self.best_eval, self.best_step, self.stale = loss, self.step, 0
        else:
            self.stale += 1
        return better

    def to_json(self) -> dict[str, Any]:
        """Return what ``json.dumps`` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> RunState:
        """Return the state that `to_json` wrote.

        Raises
        ------
        InputError
            If members are missing or strange.
        """
        names = {entry.name for entry in fields(cls)}
        if set(members) != names or not isinstance(members["cursor"], dict):
            raise InputError("the checkpoint does not say where its run stood")
        return cls(**members)
