"""Disk space that a run will take, estimated before it begins.

A checkpoint holds parameters, optimizer states and each rank's statistics, and an adapter to try
out. A new one is whole before the oldest goes, so there is one more at times than are kept; and so
there are two at times of what ``--best`` keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loraformat.train.loop.optimizer_options import state_bytes
from loraformat.train.run.memory_plan import ModelDims, format_bytes
from loraformat.train.run.options import TrainOptions

__all__ = ["DiskPlan", "plan_disk"]

#: Headers, options and records of a checkpoint or an adapter (bytes).
_RECORDS = 1_000_000
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes, by what they are for.

    Attributes
    ----------
    checkpoints : int
        One more than are kept.
    best : int
        What ``--best`` keeps, twice.
    states : int
        Optimizer states that lie on the disk while the run goes on.
    adapter : int
        The result.
    """

    checkpoints: int
    best: int
    states: int
    adapter: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.checkpoints + self.best + self.states + self.adapter

    def to_json(self) -> dict[str, Any]:
        """Return the figures for ``json.dumps``."""
        return {**asdict(self), "total": self.total}

    def line(self) -> str:
        """Say it for people."""
        parts = ", ".join(
            f"{name} {format_bytes(size)}" for name, size in asdict(self).items() if size
        )
        return f"disk at most about {format_bytes(self.total)}: {parts}"


def plan_disk(shape: ModelDims, options: TrainOptions, ranks: int = 1) -> DiskPlan:
    """Return the plan of a run.

    Parameters
    ----------
    shape : ModelDims
    options : TrainOptions
    ranks : int
        Processes, each with statistics of its own.

    Examples
    --------
    A million numbers, AdamW, two checkpoints kept:

    >>> shape = ModelDims(2, 64, 256, 1000, 10**6, 10**5, trained=10**6)
    >>> plan_disk(shape, TrainOptions()).line()
    'disk at most about 59.0 MB: checkpoints 54.0 MB, adapter 5.0 MB'
    """
    states = state_bytes(options.optimizer, shape.trained, shape.small)
    parameters = _FLOAT * shape.trained
    # Statistics are summed in float64, and stored with an adapter in float32.
    adapter = parameters + _FLOAT * shape.fixed + shape.extra_bytes // 2 + _RECORDS
    checkpoint = parameters + states + ranks * shape.extra_bytes + adapter + _RECORDS
    best = parameters + shape.extra_bytes + _RECORDS if options.best else 0
    return DiskPlan(
        checkpoints=(options.keep + 1) * checkpoint,
        best=2 * best,
        states=states if options.optimizer_states == "disk" else 0,
        adapter=adapter,
    )
