"""Resolution of adapter names to base tensors, and their names in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from loraformat.families.expert_names import spelled_in_memory, spelled_on_disk
from loraformat.families.model_class import names_base_class
from loraformat.families.tensor_names import layer_of
from loraformat.model.base_names.in_memory import InMemory, bare, in_memory
from loraformat.model.base_names.meta_model import task_of
from loraformat.model.base_names.sources import Chunk
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import parse

__all__ = ["BaseNames", "Parameter", "names_of"]

#: Model types whose checkpoints have the names of memory if they begin as here: no need to build
#: the model to know them.
_AS_STORED = {
    "gemma": "model.", "gemma2": "model.", "gemma3_text": "model.", "gpt2": "transformer.",
    "llama": "model.", "mistral": "model.", "olmo2": "model.", "phi3": "model.",
    "qwen2": "model.", "qwen3": "model.", "smollm3": "model.", "starcoder2": "model.",
}  # fmt: skip
#: Where transformers is not installed: renamings of every class that it wraps around a language
#: model.
_RENAMED = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
)
_TOWER = re.compile(r"vision|visual|audio|image|encoder|talker")


class Parameter(NamedTuple):
    """A parameter of a base: its stored tensor, or its name in memory where that is none."""

    target: str
    shape: tuple[int, ...]


class BaseNames:
    """Resolver of adapter names to a base's tensors.

    Versions of transformers put the layers of a language model at other places
    (``model.language_model.``, ``language_model.model.``), rename modules and fuse them while
    they load; checkpoints leave out a prefix or keep it. A name is taken as it stands if the base
    has it. Else transformers is asked, where it is installed and knows the class; else it is found
    if one tensor alone ends alike, and what comes before is no tower that sees or hears.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Of the stored tensors.
    config : mapping, optional
        ``config.json``; without it transformers is not asked.
    task : str, optional
        ``task_type`` of the adapter, which may be for another class than the config names; see
        `loraformat.model.base_names.meta_model.task_of`.

    Examples
    --------
    >>> names = BaseNames({"model.language_model.layers.0.q.weight": (8, 8)})
    >>> names.find("language_model.model.layers.0.q.weight")
    'model.language_model.layers.0.q.weight'
    >>> names.find("model.layers.1.q.weight") is None
    True
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any] | None = None,
        task: str | None = None,
    ) -> None:
        self.shapes, self._config = shapes, config or {}
        self._task = task_of(self._config, task)
        base_class = names_base_class(self._config) or self._task == "FEATURE_EXTRACTION"
        #: What the names begin with if the class is the one that the checkpoint was saved from.
        self._prefix = None if base_class else _AS_STORED.get(str(self._config.get("model_type")))
        self._memory: InMemory | None = None
        self._asked = not self._config
        self._bare: dict[str, list[str]] = {}
        self._tails: dict[str, list[str]] = {}
        for name in shapes:
            self._bare.setdefault(bare(name), []).append(name)
            parts = name.split(".")
            for first in range(1, min(len(parts), 12)):
                if not _TOWER.search(".".join(parts[:first])):
                    self._tails.setdefault(".".join(parts[first:]), []).append(name)

    @property
    def known(self) -> bool:
        """Whether the base's tensors are known, not its config alone."""
        return bool(self.shapes)

    @property
    def as_stored(self) -> bool:
        """Whether every tensor is known to be stored under its in-memory name and shape."""
        if self._prefix is None:
            return False
        layers = {layer_of(name) for name in self.shapes} - {None}
        said = self._config.get("num_hidden_layers", self._config.get("n_layer"))
        inside = all(name.startswith((self._prefix, "lm_head.")) for name in self.shapes)
        return inside and len(layers) == said

    @property
    def memory(self) -> InMemory | None:
        """The base as transformers has it in memory; None if unknown."""
        if not self._asked:
            self._asked = True
            self._memory = in_memory(self._config, self.shapes, self._task)
        return self._memory

    def find(self, name: str) -> str | None:
        """Resolve an adapter's name to a stored tensor; None if there is none."""
        if name in self.shapes:
            return name
        if self.memory is not None and (found := self.memory.find(name)) is not None:
            stored = self.memory.sources.single.get(found)
            if stored is not None or self._is_made(found):
                return stored
        for spelling in dict.fromkeys((name, spelled_on_disk(name))):
            short = bare(spelling)
            for alike in (self._bare.get(short, []), self._tails.get(short, [])):
                if len(alike) == 1:
                    return alike[0]
        return None

    def parameter(self, name: str) -> Parameter | None:
        """Resolve an adapter's name to a parameter, however it is stored.

        Of one that is made of several tensors, or of some rows of one, the target is its name in
        memory: see `stack` and `chunk`.
        """
        stored = self.find(name)
        if stored is not None:
            return Parameter(stored, self.shapes[stored])
        found = self.memory.find(name) if self.memory is not None else None
        if self.memory is None or found is None or not self._is_made(found):
            return None
        return Parameter(found, self.memory.shapes[found])

    def _is_made(self, name: str) -> bool:
        """Tell whether a parameter is composed of several stored tensors or a part of one."""
        assert self.memory is not None
        found = self.memory.sources
        return any(name in made for made in (found.stacked, found.chunks, found.computed))

    def computed(self, target: str) -> str | None:
        """Return the conversion of a parameter that cannot be reproduced; None otherwise."""
        return self.memory.sources.computed.get(target) if self.memory is not None else None

    def stack(self, target: str) -> list[list[str]]:
        """Return the stored tensors of a fused parameter: expert by expert, in order of rows."""
        return self.memory.sources.stacked.get(target, []) if self.memory is not None else []

    def chunk(self, target: str) -> Chunk | None:
        """Return the stored tensor of which a parameter is some rows, or None."""
        return self.memory.sources.chunks.get(target) if self.memory is not None else None

    def in_memory(self, target: str) -> str:
        """Return the name of a stored tensor or parameter in transformers and PEFT.

        Examples
        --------
        >>> BaseNames({}).in_memory("language_model.model.layers.0.mlp.up_proj.weight")
        'model.language_model.layers.0.mlp.up_proj.weight'
        """
        if self._prefix is not None and target.startswith((self._prefix, "lm_head.")):
            return target
        if self.memory is not None:
            return self.memory.names.get(target) or self.memory.find(target) or target
        for pattern, replacement in _RENAMED:
            target = pattern.sub(replacement, target)
        return spelled_in_memory(target)


def names_of(base: Checkpoint, task: Any = None) -> BaseNames:
    """Return the resolver for a base and task, cached for the last few bases."""
    shapes = tuple((name, one.shape) for name, one in base.tensors.items())
    return _names(shapes, base.config, task if isinstance(task, str) else None)


@lru_cache(maxsize=4)
def _names(
    shapes: tuple[tuple[str, tuple[int, ...]], ...], config: bytes | None, task: str | None
) -> BaseNames:
    return BaseNames(dict(shapes), parse(config) if config else None, task)
