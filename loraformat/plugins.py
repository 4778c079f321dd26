"""The plugin registry of converters.

A converter is a record, not a base class: a name, what it reads into, what it writes
from, and what it cannot express. Converters are found through the entry-point group
``loraformat.converters``; installing a package that declares one is all it takes.
``converters/README.md`` shows how to write one, `loraformat.testing` how to test it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loraformat.errors import (
    InputError,
    LoraFormatError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
    printable,
)
from loraformat.model.foreign_adapters import refuse_foreign_adapter

if TYPE_CHECKING:
    from loraformat.model.adapter import Adapter
    from loraformat.model.adapter_facts import AdapterFacts
    from loraformat.model.checkpoint import Checkpoint, LazyTensor
    from loraformat.model.packed_weights import Signature
    from loraformat.model.quantization_method import QuantizationMethod
    from loraformat.model.written import WrittenModel
    from loraformat.storage.atomic_output import AtomicOutput
    from loraformat.tensors.arrays import Array
__all__ = [
    "GROUP",
    "AdapterReadOptions",
    "AdapterWriteOptions",
    "Converter",
    "Forecast",
    "ReadOptions",
    "Requirement",
    "RoundingObserver",
    "WriteOptions",
    "all_converters",
    "for_output",
    "get",
    "quantization_readers",
    "quantization_signatures",
    "sniff",
]

#: What a file has at the end of its name, and a directory seldom has.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]{2,11}")
#: Entry-point group under which converters are announced.
GROUP = "loraformat.converters"


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package that a converter needs: the module to look for, and what pip calls it."""

    module: str
    package: str


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a user may ask of a reader whose format says less than a checkpoint, or more.

    Attributes
    ----------
    config : bytes or None
        The model's ``config.json``, where the format holds none.
    dtype : str or None
        safetensors name of the type to which numbers of the format's own types are rounded;
        None for the reader's default.
    exact : bool
        Without a ``dtype``: rather a wider default than one that does not hold them.
    allow_pickle : bool
        Read a pickle, with a loader that makes nothing but tensors.
    """

    config: bytes | None = None
    dtype: str | None = None
    exact: bool = False
    allow_pickle: bool = False


class RoundingObserver(Protocol):
    """Sees what a writer stores of tensors, beside what they were."""

    def before(self, name: str) -> LazyTensor | None:
        """Return what a tensor of the checkpoint was, in its shape; None if nobody asks."""

    def compare(self, before: Array, wanted: Array, stored: Array, untouched: Array | None) -> Any:
        """Measure some of its numbers; several threads may call.

        Parameters
        ----------
        before, wanted : array
            What they were and what they are, before they are rounded; float32, of one shape.
        stored, untouched : array
            What is read again of ``wanted``, and what would be of ``before``: some writers say
            that of a part of all numbers, which is enough to count by, and None of the others.
        """

    def add(self, name: str, measured: Any) -> None:
        """Take what `compare` returned, piece by piece, in the order of the file."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What a user may ask of every writer.

    Attributes
    ----------
    shard_limit : int
        Bytes of tensor data per file.
    progress : callable
        Called with the bytes of each tensor that has been written, as ``tensor.nbytes``
        counts them.
    dtype : str or None
        One of the converter's own ``dtypes``, if it has any.
    pre_tokenizer : str or None
        The pre-tokenizer's name in the format, where it is not to be recognised.
    watch : RoundingObserver or None
        Of a writer that rounds to types of its own: who wants to see what it stores.
    """

    shard_limit: int
    progress: Callable[[int], None] = lambda nbytes: None
    dtype: str | None = None
    pre_tokenizer: str | None = None
    watch: RoundingObserver | None = None


def _no_note(sentence: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class AdapterReadOptions:
    """What a reader of adapters may need to know.

    Attributes
    ----------
    base : Checkpoint or None
        The base that the adapter will be applied to: names and orientation are held
        against it. It stays the caller's to close.
    allow_pickle : bool
        Read a pickled file, too, with a loader that makes nothing but tensors.
    conditional : bool
        Read one that acts on some tokens only (aLoRA), too: it is carried over or looked at,
        not merged or computed with.
    inspect : bool
        It is only looked at: what the format leaves open without the base (the order of the
        rows of B in GGUF) may stay open.
    """

    base: Checkpoint | None = None
    allow_pickle: bool = False
    conditional: bool = False
    inspect: bool = False


@dataclass(frozen=True, slots=True)
class AdapterWriteOptions:
    """What a user may ask of every writer of adapters.

    Attributes
    ----------
    dtype : str or None
        Of the factors, as safetensors names it, or one of the converter's own ``dtypes`` in
        capitals; rounded to nearest even. None keeps each, or is the format's default.
    base : Checkpoint or None
        The base that the adapter belongs to, for formats that need its config or shapes. It
        may have a config and no tensors.
    keep_scaling : bool
        Leave B as it is and say the scaling as alpha and rank, where the format can.
    note : callable
        Called with each sentence that a user should read about what was written.
    """

    dtype: str | None = None
    base: Checkpoint | None = None
    keep_scaling: bool = False
    note: Callable[[str], None] = _no_note


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a writer would write, known without computing any number.

    Attributes
    ----------
    nbytes : int
        Exactly the bytes of its files.
    notes : tuple of str
        What it would say to a user, as far as that is known.
    """

    nbytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Converter:
    """One format.

    Attributes
    ----------
    name : str
        The word for ``--from`` and ``--to``.
    kind : {"base", "adapter"}
    summary : str
        One line for ``loraformat formats``.
    sniff : callable
        Tells whether a path holds this format, by content and cheaply. At most one converter
        may say yes.
    read : callable or None
        Opens a path as a lazy `Checkpoint`.
    read_with : callable or None
        The same with `ReadOptions`, for a format that needs them.
    write : callable or None
        Writes a checkpoint into a publication's work directory.
    read_adapter : callable or None
        Opens a path as an `Adapter`.
    write_adapter : callable or None
        Writes an adapter into a publication's work directory.
    examine : callable or None
        Looks at an adapter as other programs find it, for ``loraformat check``, and refuses
        nothing but damage. Without it an adapter is read, and what that refuses is an error.
    estimate : callable or None
        Tells of a checkpoint and a target path what ``write`` would write, and refuses what it
        would refuse. Without it a dry run adds up the tensors.
    forecast_adapter : callable or None
        The same for ``write_adapter``.
    stores : {"nf4", "dense", "both"}
        Encodings that the writer can take. Before a writer of "dense" is called, NF4 weights
        are made to dequantize when loaded; before one of "nf4", decoder linears are made to
        quantize. "both" takes them as they come.
    dtypes : tuple of str
        Words for ``--dtype`` that the writer heeds itself. Then it gets all weights as they
        are, those in NF4 as float32, rounds them once, and shows `WriteOptions.watch` what it
        stores. A writer of adapters rounds in any case; without this it is asked for ``f32``,
        ``f16`` and ``bf16`` only.
    loses : tuple of str
        What the format cannot express, as sentences. A loss that both formats name is none.
    output : {"directory", "file"}
        What the writer makes. A writer of "file" creates one file of the name
        ``publication.file_name``.
    suffixes : tuple of str
        File name endings, in either case, that choose this format for an output.
    pre_tokenizers : bool
        Whether ``write`` heeds `WriteOptions.pre_tokenizer`; without it ``--pre`` is refused.
    takes_config : bool
        Whether ``read_with`` heeds `ReadOptions.config`; without it ``--config`` is refused.
    requires : tuple of Requirement
    method : QuantizationMethod or None
        How the weights are quantized, of a safetensors directory in whose place others are dense.
    """

    name: str
    kind: Literal["base", "adapter"]
    summary: str
    sniff: Callable[[Path], bool]
    read: Callable[[Path], Checkpoint] | None = None
    read_with: Callable[[Path, ReadOptions], Checkpoint] | None = None
    read_adapter: Callable[[Path, AdapterReadOptions], Adapter] | None = None
    write_adapter: Callable[[Adapter, AtomicOutput, AdapterWriteOptions], None] | None = None
    examine: Callable[[Path, AdapterReadOptions], AdapterFacts] | None = None
    write: Callable[[Checkpoint, AtomicOutput, WriteOptions], WrittenModel] | None = None
    estimate: Callable[[Checkpoint, Path, WriteOptions], Forecast] | None = None
    forecast_adapter: Callable[[Adapter, Path, AdapterWriteOptions], Forecast] | None = None
    stores: Literal["nf4", "dense", "both"] = "dense"
    dtypes: tuple[str, ...] = ()
    loses: tuple[str, ...] = ()
    output: Literal["directory", "file"] = "directory"
    suffixes: tuple[str, ...] = ()
    pre_tokenizers: bool = False
    takes_config: bool = False
    requires: tuple[Requirement, ...] = ()
    method: QuantizationMethod | None = None

    @property
    def reads(self) -> bool:
        """Whether it can open a path."""
        return self.read is not None or self.read_adapter is not None

    @property
    def writes(self) -> bool:
        """Whether it can write an output."""
        return self.write is not None or self.write_adapter is not None

    def check_pre_tokenizer(self, name: str | None) -> None:
        """Raise `UsageError` for ``--pre`` if the writer knows no such thing."""
        if name is not None and not self.pre_tokenizers:
            raise UsageError(
                f"--pre {name} is for GGUF files, and the output is {self.name}",
                hint="omit it, or write a GGUF file: --to gguf",
            )

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [needed.package for needed in self.requires if find_spec(needed.module) is None]

    def check_installed(self) -> None:
        """Raise `MissingDependencyError` with the pip command if a package is missing."""
        if missing := self.missing():
            raise MissingDependencyError(
                f"the {self.name} converter needs {', '.join(missing)}",
                hint=f"run: pip install {' '.join(missing)}",
            )


@cache
def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise LoraFormatError(
                f"two packages provide a converter {entry.name!r}: {other.value} and {entry.value}",
                hint="uninstall one of them",
            )
    return found


def _names() -> list[str]:
    return sorted(_entry_points())


@cache
def _load(name: str) -> Converter:
    entry = _entry_points()[name]
    try:
        converter = entry.load()
    except Exception as error:  # a stranger's package may fail in any way
        raise LoraFormatError(
            f"the converter {name!r} ({entry.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}",
            hint="update or uninstall the package it comes from",
        ) from error
    if not isinstance(converter, Converter) or converter.name != name:
        raise LoraFormatError(f"{entry.value} is not a Converter named {name!r}")
    return converter


def all_converters() -> list[Converter]:
    """Return every installed converter, sorted by name."""
    return [_load(name) for name in _names()]


def quantization_readers() -> dict[str, str]:
    """Return the quantization methods that converters read, each with its converter's name."""
    return {one.method.name: one.name for one in all_converters() if one.method is not None}


def quantization_signatures() -> list[Signature]:
    """Return how methods are detected that converters bring along."""
    methods = (one.method for one in all_converters())
    return [method.signature for method in methods if method is not None and method.signature]


def get(name: str) -> Converter:
    """Return a converter by name.

    Raises
    ------
    UsageError
        If there is none of that name.
    MissingDependencyError
        If a package that it needs is not installed.
    """
    if name not in _entry_points():
        raise UsageError(f"unknown format {name!r}, wanted one of {', '.join(_names())}")
    converter = _load(name)
    converter.check_installed()
    return converter


def sniff(path: Path, kind: str | None = None) -> Converter:
    """Return the converter that recognises a path by its content.

    Parameters
    ----------
    path : Path
    kind : {"base", "adapter"}, optional
        What is wanted, where a directory holds one of each.

    Raises
    ------
    InputError
        If the path does not exist.
    UnsupportedError
        If no converter knows it, or more than one does.
    """
    if not path.exists():
        raise InputError("no such file or directory", path=path)
    known = [converter for converter in all_converters() if _recognises(converter, path)]
    if all(converter.kind == "base" for converter in known):
        refuse_foreign_adapter(path, recognised=bool(known))
    if len(known) > 1 and kind is not None:
        known = [converter for converter in known if converter.kind == kind] or known
    if len(known) == 1:
        known[0].check_installed()
        return known[0]
    if known:
        names = " and ".join(converter.name for converter in known)
        raise UnsupportedError(f"looks like {names}", path=path, hint=_choice(known))
    raise UnsupportedError(
        f"contains no model in a known format ({', '.join(_names())})",
        path=path,
        hint=_missing(path),
    )


def _choice(known: list[Converter]) -> str:
    """Return how to say which of several formats is meant; most verbs have no ``--from``."""
    if len({converter.kind for converter in known}) == 1:
        return "choose one with --from"
    return (
        "it contains a model and an adapter: move the adapter's files (adapter_config.json, "
        "adapter_model.*) to a directory of their own"
    )


def _missing(path: Path) -> str:
    if path.is_dir():
        return "a model directory holds .safetensors files and a config.json"
    if path.is_file() and not path.stat().st_size:
        return "it is empty; download or copy it again"
    return "its first bytes match no known format; download or copy it again"


def _recognises(converter: Converter, path: Path) -> bool:
    try:
        return converter.sniff(path)
    except Exception as error:  # a stranger's package may fail in any way
        raise LoraFormatError(
            f"the converter {converter.name!r} fails to detect the format: "
            f"{type(error).__name__}: {error}",
            path=path,
            hint="give the format with --from, or update the package",
        ) from error


def for_output(
    path: Path, name: str | None, kind: str = "base", default: str | None = None
) -> Converter:
    """Return the converter for an output: by name, else by suffix, else the default.

    Parameters
    ----------
    path : Path
    name : str or None
        What the user said with ``--to``.
    kind : {"base", "adapter"}
    default : str, optional
        ``loraformat`` for a base and ``peft`` for an adapter, if it is not given.

    Raises
    ------
    UsageError
        If that format cannot be written, or is of the other kind.
    """
    if name is None:
        name = (
            _by_suffix(all_converters(), path, kind)
            or default
            or {"base": "loraformat", "adapter": "peft"}[kind]
        )
    converter = get(name)
    if converter.kind != kind:
        said = {"base": "a base", "adapter": "an adapter"}
        raise UsageError(f"format {name!r} is for {said[converter.kind]}, and this is {said[kind]}")
    if not converter.writes:
        raise UsageError(f"format {name!r} can be read but not written")
    return converter


def _by_suffix(converters: Sequence[Converter], path: Path, kind: str) -> str | None:
    name = path.name.lower()
    for converter in converters:
        suffixes = tuple(suffix.lower() for suffix in converter.suffixes)
        if converter.kind == kind and converter.writes and name.endswith(suffixes):
            return converter.name
    if _FILE_SUFFIX.fullmatch(path.suffix) and not path.is_dir():
        said = {"base": "a base", "adapter": "an adapter"}[kind]
        known = {s for c in converters if c.kind == kind and c.writes for s in c.suffixes}
        near = get_close_matches(path.suffix.lower(), known, 1)
        meant = f"did you mean {printable(path.with_suffix(near[0]))}? Else " if near else ""
        raise UsageError(
            f"no installed converter writes {said} as {path.suffix} file",
            hint=f"{meant}give a directory, or the format with --to",
        )
    return None
