"""Options of the optimizer, and the learning-rate schedule.

A schedule is a pure function of the step: nothing has to be kept for a run to be resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraformat.errors import UsageError

__all__ = ["OPTIMIZERS", "SCHEDULES", "SMALL", "OptimizerOptions", "Schedule", "state_bytes"]

#: Words for `OptimizerOptions.kind`, and bytes of state per trained number.
OPTIMIZERS = {"adamw": 8.0, "sgd": 0.0, "adamw-8bit": 2.04, "paged-adamw-8bit": 2.04}
#: A tensor of fewer numbers than this has states of 32 bits in bitsandbytes.
SMALL = 4096


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """How parameters are updated.

    Attributes
    ----------
    kind : str
        ``adamw`` (Loshchilov and Hutter 2019; float32 states), ``sgd`` (without momentum),
        ``adamw-8bit`` and ``paged-adamw-8bit`` (bitsandbytes: states in blocks of 256 8-bit
        numbers; Dettmers 2022; paged ones live in memory that CUDA moves).
    weight_decay : float
        Decoupled; on matrices only.
    betas : tuple of float
    epsilon : float
    states : str
        ``memory``, or ``disk``: mapped files, with the same arithmetic.
    """

    kind: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    states: str = "memory"

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise UsageError(f"optimizer is {self.kind!r}, wanted one of {', '.join(OPTIMIZERS)}")
        if self.states not in ("memory", "disk"):
            raise UsageError(f"optimizer-states is {self.states!r}, wanted memory or disk")
        if self.states == "disk" and self.kind != "adamw":
            raise UsageError(
                f"the states of {self.kind} cannot be kept on disk", hint="use adamw for that"
            )


def state_bytes(kind: str, parameters: int, small: int = 0) -> int:
    """Return what an optimizer keeps for so many trained numbers (bytes).

    `small` is how many of them are in tensors smaller than `SMALL`.

    Examples
    --------
    >>> state_bytes("adamw", 10_000), state_bytes("adamw-8bit", 10_000)
    (80000, 20400)
    >>> state_bytes("adamw-8bit", 10_000, small=10_000)
    80000
    """
    if "8bit" not in kind:
        return round(OPTIMIZERS[kind] * parameters)
    return round(OPTIMIZERS[kind] * (parameters - small)) + 8 * small


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
