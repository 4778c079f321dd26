"""Tensor names of a base in transformers, and the stored tensors that form each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from loraformat.model.base_names.meta_model import build_on_meta
from loraformat.model.base_names.sources import conversions_of, expert_names, find_sources

__all__ = ["InMemory", "bare"]

#: What architectures, and versions of transformers, put before the layers.
_PLACES = re.compile(r"^(?:(?:model|language_model|text_model|transformer)\.)+")


def bare(name: str) -> str:
    """Return a name without the prefix before the layers.

    Examples
    --------
    >>> bare("model.language_model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    return _PLACES.sub("", name)


class InMemory:
    """A base as transformers has it in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Without weights; see `loraformat.model.base_names.meta_model.build_on_meta`.
    stored : iterable of str
        The names of the checkpoint's tensors.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Of every parameter and buffer.
    sources : Sources
        The stored tensors that each is made of.
    names : dict of str to str
        Of stored tensors that are one parameter: its name in memory.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        parameters = model.named_parameters(remove_duplicate=False)
        buffers = model.named_buffers(remove_duplicate=False)
        self.shapes = {name: tuple(t.shape) for pairs in (parameters, buffers) for name, t in pairs}
        self.sources = find_sources(model, stored)
        self.names = {tensor: name for name, tensor in self.sources.single.items()}
        self._table = conversions_of(model)
        self._bare: dict[str, list[str]] = {}
        for name in self.shapes:
            self._bare.setdefault(bare(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Resolve a name of any transformers version to a parameter; None if unknown."""
        if name in self.shapes:
            return name
        for candidate in (self._renamed(name), name):
            if candidate in self.shapes:
                return candidate
            alike = self._bare.get(bare(candidate), [])
            if len(alike) == 1:
                return alike[0]
        return None

    def expert_names(self, target: str) -> list[list[str]]:
        """Return names for the experts of a fused parameter one by one; none if it has none.

        See `loraformat.model.base_names.sources.expert_names`.
        """
        return expert_names(self._table, target, self.shapes[target][0])

    def _renamed(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        table, shapes = self._table, self.shapes
        found, _ = rename_source_key(name, table.renamings, [], table.base_model_prefix, shapes)
        return str(found)


def in_memory(
    config: Mapping[str, Any], stored: Iterable[str], task: str | None = None
) -> InMemory | None:
    """Return a base as transformers has it in memory; None if transformers cannot build it.

    Its class is that of the task, see `loraformat.model.base_names.meta_model.build_on_meta`.
    """
    with warnings.catch_warnings():  # transformers' own, about its own attributes
        warnings.simplefilter("ignore")
        model = build_on_meta(config, task=task)
        return None if model is None else InMemory(model, stored)
