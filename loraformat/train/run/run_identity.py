"""Identity of a run: the options, base, data and ranks that must be the same to resume it.

A run is resumed only as the same run; otherwise its result would be neither the old run's nor a
new one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraformat.errors import UsageError, printable
from loraformat.train.run.options import SETTINGS, TrainOptions

__all__ = ["check_same", "identity_of"]


#: The members of an identity in words.
_NAMES = {
    "base": "the base's fingerprint",
    "data": "the data's fingerprint",
    "held_out": "the held-out data's fingerprint",
    "ranks": "the number of processes",
    "steps": "the number of steps",
    "compute": "device and type of products",
}


def identity_of(
    options: TrainOptions,
    *,
    base: str,
    data: str,
    held_out: str | None,
    ranks: int,
    steps: int,
    compute: str,
) -> dict[str, Any]:
    """Return what a checkpoint keeps to know its run by.

    Parameters
    ----------
    options : TrainOptions
    base : str
        Fingerprint of the bundle.
    data, held_out : str
        Fingerprints of the data.
    ranks : int
        Processes.
    steps : int
        Of the whole run.
    compute : str
        Device and type of products.
    """
    told = options.to_json()
    return {
        "options": {setting.flag: told[setting.flag] for setting in SETTINGS if not setting.free},
        "base": base,
        "data": data,
        "held_out": held_out,
        "ranks": ranks,
        "steps": steps,
        "compute": compute,
    }


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another run's checkpoint.

    Raises
    ------
    UsageError
        Naming every difference.

    Examples
    --------
    >>> run = {"options": {"lr": 0.1}, "base": "ab"}
    >>> check_same(run, run)
    >>> check_same(run, {"options": {"lr": 0.2}, "base": "ab"})
    Traceback (most recent call last):
    loraformat.errors.UsageError: the run was started with other settings: --lr was 0.1 and is \
0.2; use the original settings, or start a new run with another --output
    """
    differences = []
    was, is_now = dict(before.get("options") or {}), dict(now["options"])
    for flag in sorted(was.keys() | is_now.keys()):
        if was.get(flag) != is_now.get(flag):
            differences.append(_difference(f"--{flag}", was.get(flag), is_now.get(flag)))
    for name in sorted((before.keys() | now.keys()) - {"options"}):
        if before.get(name) != now.get(name):
            differences.append(_difference(_NAMES.get(name, name), before.get(name), now.get(name)))
    if differences:
        raise UsageError(
            f"the run was started with other settings: {', '.join(differences)}",
            hint="use the original settings, or start a new run with another --output",
        )


def _difference(what: str, before: object, now: object) -> str:
    def short(value: object) -> str:
        text = printable(value)
        return text if len(text) <= 40 else f"{text[:12]}…"

    return f"{what} was {short(before)} and is {short(now)}"
