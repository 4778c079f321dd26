"""Tensor names of a base in transformers, and the stored tensors that form each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from loraformat.model.base_names.meta_model import build_on_meta
from loraformat.model.base_names.sources import Chunk, conversions_of, find_sources

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
    stacks : dict of str to list of list of str
        Of fused parameters the stored tensors, expert by expert, one below the other.
    chunks : dict of str to Chunk
        Parameters that are some rows of a stored tensor.
    computed : dict of str to str
        Parameters that are made of stored tensors in any other way, and by what.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        parameters = model.named_parameters(remove_duplicate=False)
        buffers = model.named_buffers(remove_duplicate=False)
        self.shapes = {name: tuple(t.shape) for pairs in (parameters, buffers) for name, t in pairs}
        sources = find_sources(model, stored)
        self.stacks: dict[str, list[list[str]]] = sources.stacked
        self.chunks: dict[str, Chunk] = sources.chunks
        self.computed: dict[str, str] = sources.computed
        self._stored = sources.single
        self._names = {tensor: name for name, tensor in sources.single.items()}
        self._table = conversions_of(model)
        self._bare: dict[str, list[str]] = {}
        for name in self.shapes:
            self._bare.setdefault(bare(name), []).append(name)

    def name_of(self, stored: str) -> str | None:
        """Return the in-memory name of a stored tensor; None if it is not one parameter."""
        return self._names.get(stored)

    def stored_as(self, name: str) -> str | None:
        """Return the stored tensor of a parameter; None if it is not a single one."""
        return self._stored.get(name)

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
