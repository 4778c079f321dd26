"""Which tensors of a bundle each parameter of a model is made of, for training on mapped weights.

Only what keeps the tensors where they are is known here: renaming and stacking.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loraformat.errors import UnsupportedError, printable
from loraformat.model.base_names.sources import Sources
from loraformat.model.base_names.sources import find_sources as find_any_sources

__all__ = ["Sources", "find_sources"]


def find_sources(model: Any, names: Iterable[str], path: object) -> Sources:
    """Assign the tensors of a bundle to a model's parameters.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    names : iterable of str
        Of all tensors.
    path : object
        For messages.

    Raises
    ------
    UnsupportedError
        If transformers would compute a parameter from several tensors in another way.
    """
    sources = find_any_sources(model, names)
    computed = sources.computed | dict.fromkeys(sources.chunks, "Chunk")
    for target, how in computed.items():
        raise UnsupportedError(
            f"parameter {printable(target)} is made by {how} when transformers loads it, which "
            "training on mapped weights does not know",
            path=f"{path}",
        )
    return sources
