"""Data classes that cards are generated from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraformat.runtimes.chat import Chat

__all__ = [
    "AdapterFacts",
    "Base",
    "BundleFacts",
    "BundledAdapter",
    "FileFact",
    "Licence",
    "Training",
]


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence as a card's front matter names it.

    Attributes
    ----------
    identifier : str
        ``apache-2.0``, ``llama3.2``, ``other``, ...
    name, link : str or None
        Where the identifier is ``other``.
    """

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The base model, on the Hub.

    Attributes
    ----------
    repo : str
        ``org/name``.
    revision : str or None
        The commit that the adapter was made for, if that is known.
    licence : Licence or None
    """

    repo: str
    revision: str | None = None
    licence: Licence | None = None


@dataclass(frozen=True, slots=True)
class FileFact:
    """A file of the repository: path, size in bytes, SHA-256."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Training:
    """Contents of ``training_record.json``: untrusted JSON.

    Attributes
    ----------
    record : mapping
    """

    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter.

    Attributes
    ----------
    repo : str
        Where it is published, ``org/name``.
    base : Base
    ranks : list of int
    alphas, scalings : list of float
    targets : list of str
        Last names of the modules.
    modules, parameters : int
        How many weights it changes; elements of its tensors.
    dtypes : dict of str to int
        Parameters by dtype.
    files : list of FileFact
        Without the card.
    peft : bool
        Whether PEFT's files are among them.
    gguf : str or None
        The GGUF file among them.
    task : str or None
        ``CAUSAL_LM``, ...
    labels : int or None
        Of an adapter that classifies and brings its head.
    dora, biases : int
        How many modules have a magnitude, a bias.
    replacements : list of str
        Weights that it replaces, as a whole or in rows.
    fingerprint : str or None
        Of the base that it was made for.
    training : Training
    wrong_in : frozenset of str
        Runtimes that would refuse it or compute something else.
    chat : Chat, optional
        How it is prompted, if it was trained on conversations.
    """

    repo: str
    base: Base
    ranks: list[int]
    alphas: list[float]
    scalings: list[float]
    targets: list[str]
    modules: int
    parameters: int
    dtypes: dict[str, int]
    files: list[FileFact]
    peft: bool = True
    gguf: str | None = None
    task: str | None = None
    labels: int | None = None
    dora: int = 0
    biases: int = 0
    replacements: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    training: Training = field(default_factory=Training)
    wrong_in: frozenset[str] = frozenset()
    chat: Chat | None = None


@dataclass(frozen=True, slots=True)
class BundledAdapter:
    """An adapter in a bundle: ranks, last names of its modules, elements of its tensors."""

    ranks: list[int]
    targets: list[str]
    parameters: int


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """A bundle.

    Attributes
    ----------
    repo : str
    base : Base
        The model that it was quantized from.
    architecture : str or None
    headless : bool
        It has no output head: it is an embedding model, whatever class is named.
    layers, parameters, quantized_parameters : int
    weight_bytes : int
    bits_per_weight : float
    block_sizes : list of int
    double_quant : bool
    fingerprint : str
    errors : tuple of float
        Smallest and largest relative RMS error of a weight, ‖W − NF4(W)‖ / ‖W‖; empty if
        nobody measured.
    quantized_before : str or None
        How its weights were quantized before, against which the errors are then.
    adapters : dict of str to BundledAdapter
        Those beside the base, by name; their ``repo`` and ``files`` are not used.
    files : list of FileFact
    """

    repo: str
    base: Base
    architecture: str | None
    layers: int
    parameters: int
    quantized_parameters: int
    weight_bytes: int
    bits_per_weight: float
    block_sizes: list[int]
    double_quant: bool
    fingerprint: str
    errors: tuple[float, ...]
    files: list[FileFact]
    quantized_before: str | None = None
    headless: bool = False
    adapters: dict[str, BundledAdapter] = field(default_factory=dict)
