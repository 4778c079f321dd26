"""Are the samples that share a row kept apart? Each layer's mask is looked at once to know.

transformers makes block-diagonal masks of positions that begin anew, in most of its classes. In
one that does not, or in a layer that carries a state from token to token, samples would see each
other and nothing would tell: so the first packed batch is refused there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loraformat.errors import UnsupportedError, printable
from loraformat.train.batch import Batch
from loraformat.train.engine.checkpointing import Recomputation
from loraformat.train.engine.layer_call import LayerCall
from loraformat.train.engine.meta_model import text_config

__all__ = ["PackingCheck", "lets_through"]

#: Kinds of layers, as configs name them, that carry nothing on but what a mask lets through.
_MASKED = {"full_attention", "sliding_attention", "chunked_attention"}


class PackingCheck:
    """Looks at the masks of the first packed batch.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    shared : Recomputation
    path : object
        For messages.
    """

    def __init__(self, model: Any, shared: Recomputation, path: object) -> None:
        self._model, self._shared, self._path = model, shared, path
        self._known = False

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Check while a batch goes through the layers, if it is the first packed one.

        Raises
        ------
        UnsupportedError
            If a layer lets tokens see another sample's.
        """
        if self._known or not bool((batch.segments > 1).any()):
            yield
            return
        kinds = set(getattr(text_config(self._model.config), "layer_types", None) or ())
        if strange := sorted(kinds - _MASKED):
            raise self._refusal(f"its layers of type {printable(', '.join(strange))} carry a state")
        if getattr(self._model, "_is_stateful", False):
            raise self._refusal("it carries a state from token to token")
        segments = batch.segments
        foreign = (segments[:, :, None] != segments[:, None, :]) & (segments > 0)[:, :, None]

        def inspect(number: int, call: LayerCall) -> None:
            masks = [x for x in call.leaves if torch.is_tensor(x) and _is_mask(x, foreign)]
            if not masks or bool((lets_through(masks[0]) & foreign[:, None]).any()):
                raise self._refusal(f"its layer {number} does not mask other samples")

        self._shared.inspect = inspect
        try:
            yield
        finally:
            self._shared.inspect = None
        self._known = True

    def _refusal(self, reason: str) -> UnsupportedError:
        name = printable(type(self._model).__name__)
        return UnsupportedError(
            f"samples cannot be packed into one row in {name}: {reason}",
            path=f"{self._path}",
            hint="train with one sample in each row",
        )


def _is_mask(tensor: torch.Tensor, foreign: torch.Tensor) -> bool:
    return tensor.dim() == 4 and tensor.shape[-2:] == foreign.shape[-2:]


def lets_through(mask: torch.Tensor) -> torch.Tensor:
    """Return where a mask lets a token see another; it is boolean, or added to the scores.

    Examples
    --------
    >>> lets_through(torch.tensor([0.0, torch.finfo(torch.float32).min])).tolist()
    [True, False]
    """
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
