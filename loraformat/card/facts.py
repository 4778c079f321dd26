"""Data classes that cards are generated from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraformat.model.description import AdapterInfo, ModelInfo
from loraformat.runtimes.chat import Chat

__all__ = ["AdapterFacts", "Base", "BundleFacts", "FileFact", "Licence"]


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
class AdapterFacts:
    """An adapter.

    Attributes
    ----------
    repo : str
        Where it is published, ``org/name``.
    base : Base
    said : AdapterInfo
        What ``info`` says of it.
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
    training : mapping
        Contents of ``training_record.json``: untrusted JSON.
    wrong_in : frozenset of str
        Runtimes that would refuse it or compute something else.
    chat : Chat, optional
        How it is prompted, if it was trained on conversations.
    """

    repo: str
    base: Base
    said: AdapterInfo
    files: list[FileFact]
    peft: bool = True
    gguf: str | None = None
    task: str | None = None
    labels: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    wrong_in: frozenset[str] = frozenset()
    chat: Chat | None = None


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """A bundle.

    Attributes
    ----------
    repo : str
    base : Base
        The model that it was quantized from.
    said : ModelInfo
        What ``info`` says of it.
    files : list of FileFact
    headless : bool
        It has no output head: it is an embedding model, whatever class is named.
    """

    repo: str
    base: Base
    said: ModelInfo
    files: list[FileFact]
    headless: bool = False
