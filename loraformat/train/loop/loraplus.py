"""LoRA+: a faster B (Hayou 2024, section 4).

B begins at zero and is short of time: it gets a multiple of the learning rate of A; the paper
proposes 16. An embedding's factors and DoRA's magnitudes keep the plain rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from loraformat.errors import UsageError

__all__ = ["parameter_groups", "rate_ratios"]

_FASTER = ".lora_B.weight"


def rate_ratios(names: Iterable[str], ratio: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied by.

    Parameters
    ----------
    names : iterable of str
        As `loraformat.train.lora.branches.trainable` names parameters.
    ratio : float
        Of B, at least 1; 1 is plain LoRA.

    Raises
    ------
    UsageError
        If the ratio is below 1.

    Examples
    --------
    >>> rate_ratios(["q.lora_A.weight", "q.lora_B.weight"], 16.0)
    {'q.lora_A.weight': 1.0, 'q.lora_B.weight': 16.0}
    """
    if not ratio >= 1:
        raise UsageError(f"the learning-rate ratio of B is {ratio}, wanted at least 1")
    return {name: ratio if name.endswith(_FASTER) else 1.0 for name in names}


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter],
    lr: float,
    *,
    ratio: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, object]]:
    """Return groups for an optimizer of torch.

    Magnitudes are not decayed: they have no reason to be small.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        As `loraformat.train.lora.branches.trainable` names them.
    lr : float
    ratio : float
        As in `rate_ratios`.
    weight_decay : float

    Returns
    -------
    list of dict
        With ``params``, ``names``, ``lr`` and ``weight_decay``; none is empty.

    Raises
    ------
    UsageError
        If the ratio is below 1.

    Examples
    --------
    >>> from torch.nn import Parameter
    >>> q = {f"q.lora_{which}.weight": Parameter(torch.ones(1, 1)) for which in "AB"}
    >>> [(g["names"], g["lr"]) for g in parameter_groups(q, 0.1, ratio=2.0)]
    [(['q.lora_A.weight'], 0.1), (['q.lora_B.weight'], 0.2)]
    """
    found: dict[tuple[float, float], list[str]] = {}
    for name, faster in rate_ratios(parameters, ratio).items():
        decay = 0.0 if name.endswith("lora_magnitude_vector") else weight_decay
        found.setdefault((lr * faster, decay), []).append(name)
    return [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "lr": rate,
            "weight_decay": decay,
        }
        for (rate, decay), names in found.items()
    ]
