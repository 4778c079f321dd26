"""The record that describes a GGUF architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.metadata import MetadataBuilder, MetadataRow
from loraformat_converters.gguf.architectures.weights import ExpertWeightName, WeightName

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["Architecture"]


@dataclass(frozen=True)
class Architecture:
    """One architecture, by llama.cpp's name.

    Attributes
    ----------
    name : str
        ``general.architecture``.
    models : mapping of str to str
        Hugging Face model types that it can run, and the class of each for ``config.json``. The
        first is what a file is read as, unless its `keys` say another.
    defaults : mapping of str to mapping
        What each model type's configuration class says of members that a config leaves out.
    keys : tuple of MetadataRow
        Hyperparameters, in the order of the file.
    weights : tuple of WeightName or ExpertWeightName
        All tensors but the head.
    dense, mixture : tuple of WeightName or ExpertWeightName
        What models without and with experts have besides.
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
        GGUF tensors that `keys` write and read.
    names : mapping of str to str
        Members of ``config.json`` that the model's class calls otherwise than nearly all do.
    """

    name: str
    models: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Any]]
    keys: tuple[MetadataRow, ...]
    weights: tuple[WeightName | ExpertWeightName, ...]
    dense: tuple[WeightName | ExpertWeightName, ...] = ()
    mixture: tuple[WeightName | ExpertWeightName, ...] = ()
    notes: Callable[[Config], list[str]] = lambda config: []
    head: WeightName | None = field(
        default_factory=lambda: WeightName("output.weight", "lm_head.weight", "* hidden")
    )
    generates: bool = True
    bases: tuple[str, ...] = ("model.", "")
    unused: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def of(
        self, values: Mapping[str, Any], model_type: str | None = None, *, headless: bool = False
    ) -> Config:
        """Return the hyperparameters that a ``config.json`` gives, by default of the first type."""
        defaults = self.defaults[model_type or next(iter(self.models))]
        return Config(values, defaults, self.names, headless=headless)

    def rows(self, config: Config) -> tuple[WeightName | ExpertWeightName, ...]:
        """Return the table of tensors for a config."""
        return self.weights + (self.mixture if config.experts else self.dense)

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
        for row in self.keys:
            row.write(config, keys)
        return keys

    def tensors(self, config: Config) -> dict[str, list[float]]:
        """Return small float32 tensors that stand for hyperparameters, by GGUF name."""
        return {name: one for row in self.keys for name, one in row.tensors(config).items()}

    def config(self, gguf: GGUFFile) -> dict[str, Any]:
        """Return the members of ``config.json`` that a GGUF file's metadata imply.

        Raises
        ------
        InputError
            If the metadata are damaged.
        """
        members: dict[str, Any] = {"model_type": next(iter(self.models))}
        for row in self.keys:
            row.read(gguf, members)
        return {self.names.get(member, member): value for member, value in members.items()}
