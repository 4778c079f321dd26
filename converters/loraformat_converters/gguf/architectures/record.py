"""The record that describes a GGUF architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import ExpertWeightName, WeightName

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["Architecture"]


def _no_tensors(config: Config) -> dict[str, list[float]]:
    return {}


def _no_notes(config: Config) -> list[str]:
    return []


@dataclass(frozen=True)
class Architecture:
    """One architecture, by llama.cpp's name.

    Attributes
    ----------
    name : str
        ``general.architecture``.
    models : mapping of str to str
        Hugging Face model types that it can run, and the class of each for ``config.json``.
    defaults : mapping of str to mapping
        What each model type's configuration class says of members that a config leaves out.
    rows : callable
        Returns the table of tensors for a config.
    keys : callable
        Adds the hyperparameters that llama.cpp needs, or raises `UnsupportedError` with the
        reason why it would compute something else.
    config : callable
        Returns the members of ``config.json`` that a GGUF file's metadata imply.
    tensors : callable
        Returns small float32 tensors that stand for hyperparameters, by GGUF name.
    notes : callable
        Says what llama.cpp does differently, as sentences.
    head : WeightName or None
        The output head, if it may be a tensor of its own; tied heads have none.
    generates : bool
        Has an output head at all.
    bases : tuple of str
        What may precede the layers in tensor names; the first is what is written.
    unused : tuple of str
        Beginnings of names (behind the base) that llama.cpp has no use for.
    extras : tuple of str
        GGUF tensors that `config` understands.
    """

    name: str
    models: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Any]]
    rows: Callable[[Config], tuple[WeightName | ExpertWeightName, ...]]
    keys: Callable[[Config, MetadataBuilder], None]
    config: Callable[[GGUFFile], dict[str, Any]]
    tensors: Callable[[Config], dict[str, list[float]]] = _no_tensors
    notes: Callable[[Config], list[str]] = _no_notes
    head: WeightName | None = field(
        default_factory=lambda: WeightName("output.weight", "lm_head.weight")
    )
    generates: bool = True
    bases: tuple[str, ...] = ("model.", "")
    unused: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    def base_of(self, config: Config) -> str:
        """Return what stands before the layers in the names of transformers."""
        return "" if config.headless else self.bases[0]

    def head_is_embedding(self, config: Config) -> bool:
        """Tell whether the embedding is the output head, too."""
        return self.generates and (self.head is None or config.tied)

    def metadata(self, config: Config) -> MetadataBuilder:
        """Return the architecture's keys.

        Raises
        ------
        UnsupportedError
            If llama.cpp would compute something else than the model.
        InputError
            If the config is damaged.
        """
        keys = MetadataBuilder(self.name)
        self.keys(config, keys)
        return keys
