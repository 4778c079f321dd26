"""Whether adapters belong to the base that they are merged into, and what follows if not."""

from __future__ import annotations

from collections.abc import Iterable

from loraformat.errors import InputError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.ops.opening.model import compare_base

__all__ = ["check_bases"]


def check_bases(base: Checkpoint, adapters: Iterable[Adapter], allowed: bool) -> list[str]:
    """Compare the base with what each adapter says of its own.

    Parameters
    ----------
    base : Checkpoint
    adapters : iterable of Adapter
    allowed : bool
        Take an adapter that was made for another base.

    Returns
    -------
    list of str
        What a user should know.

    Raises
    ------
    InputError
        If both have a fingerprint, or the base says of which bundle it was made, and not the same.
    """
    notes, form = [], base.provenance.format
    for adapter in adapters:
        match = compare_base(adapter, base)
        if match.made_for is None:
            named = f" {printable(adapter.base_model)}" if adapter.base_model else ""
            notes.append(
                f"{adapter.path}: records its base{named} but no base fingerprint; only shapes "
                "were compared" + _trained_in_nf4(adapter, base)
            )
        elif match.relation == "unknown":
            notes.append(
                f"{adapter.path}: was made for the base {printable(match.made_for)}, and a {form} "
                "model has no fingerprint to compare; if it was trained on NF4, prefer merging "
                "into the bundle it was trained on"
            )
        elif match.relation == "other":
            if not allowed:
                raise InputError(
                    match.difference,
                    path=adapter.path,
                    hint="merge into its own base, or override with --allow-base-mismatch",
                )
            notes.append(f"{adapter.path}: {match.difference}; it may not work on this base")
        elif match.relation == "descends":
            notes.append(
                f"{adapter.path}: was made for the bundle {printable(match.made_for)}, of which "
                f"this {form} file was made; it was trained on the values in the bundle"
            )
    return notes


def _trained_in_nf4(adapter: Adapter, base: Checkpoint) -> str:
    """Say what a base of other values than those of the training means."""
    if base.provenance.format in ("loraformat", "bitsandbytes") or not adapter.base_source:
        return ""
    return "; it was trained on a bundle, whose NF4 values differ from these"
