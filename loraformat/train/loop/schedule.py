"""Learning-rate schedule: warmup, then decay.

A pure function of the step: nothing has to be kept for a run to be resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraformat.errors import UsageError

__all__ = ["SCHEDULES", "Schedule"]

#: Words for `Schedule.kind`.
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning-rate schedule: warmup to a peak, then decay.

    Attributes
    ----------
    kind : str
        ``cosine``: half a cosine from the peak to zero (Loshchilov and Hutter 2017, equation 5,
        without restarts). ``linear``: a straight line to zero. ``constant``: the peak.
    peak : float
        The highest learning rate.
    total : int
        Steps of the whole run, warmup included.
    warmup : float
        Steps in which the rate rises in a straight line; below 1 a share of `total`, rounded up.

    Examples
    --------
    >>> schedule = Schedule("linear", 1.0, total=10, warmup=2)
    >>> [schedule(step) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """

    kind: str
    peak: float
    total: int
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"schedule is {self.kind!r}, wanted one of {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise UsageError(
                f"warmup is {self.warmup}, wanted a number of steps, or a share below 1"
            )
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise UsageError(f"lr is {self.peak}, wanted a number above 0")

    @property
    def warmup_steps(self) -> int:
        """Number of steps before the peak."""
        steps = self.warmup if self.warmup >= 1 else self.warmup * self.total
        return min(math.ceil(steps), self.total)

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, the first being 0."""
        warm = self.warmup_steps
        if step < warm:
            return self.peak * (step + 1) / warm
        if self.kind == "constant":
            return self.peak
        done = (step - warm) / max(1, self.total - warm)
        if self.kind == "linear":
            return self.peak * (1 - done)
        return self.peak * 0.5 * (1 + math.cos(math.pi * done))
