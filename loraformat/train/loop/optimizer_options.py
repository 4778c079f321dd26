"""Options of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.errors import UsageError

__all__ = ["OPTIMIZERS", "SMALL", "OptimizerOptions", "state_bytes"]

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

    Parameters
    ----------
    kind : str
    parameters : int
        Trained numbers.
    small : int
        How many of them are in tensors smaller than `SMALL`.

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
