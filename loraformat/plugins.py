"""The plugin registry of converters.

A converter is a record, a `BaseFormat` or an `AdapterFormat`: a name, the functions that read and
write, and what the format cannot express. Converters are found through the entry-point group
``loraformat.converters``; installing a package that declares one is all it takes.
``converters/README.md`` shows how to write one, `loraformat.testing` how to test it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

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
    from loraformat.model.quantization_method import QuantizationMethod
    from loraformat.model.written import WrittenModel
    from loraformat.storage.atomic_output import AtomicOutput
    from loraformat.tensors.arrays import Array
__all__ = [
    "GROUP",
    "AdapterFormat",
    "AdapterReadOptions",
    "AdapterWriteOptions",
    "BaseFormat",
    "Forecast",
    "Format",
    "ReadOptions",
    "RoundingObserver",
    "WriteOptions",
    "all_converters",
    "for_output",
    "get",
    "quantization_methods",
    "sniff",
]

#: What a file has at the end of its name, and a directory seldom has.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]{2,11}")
#: Entry-point group under which converters are announced.
GROUP = "loraformat.converters"


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
    note: Callable[[str], None] = lambda sentence: None


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


def _no_forecast(*_: object) -> None:
    """Leave a dry run to add up the tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a `BaseFormat` and an `AdapterFormat` have in common.

    Attributes
    ----------
    name : str
        The word for ``--from`` and ``--to``.
    summary : str
        One line for ``loraformat formats``.
    sniff : callable
        Tells whether a path holds this format, by content and cheaply. At most one converter
        may say yes.
    read : callable
        Opens a path: as a lazy `Checkpoint`, or as an `Adapter`.
    write : callable or None
        Writes such an object into a publication's work directory; None if it can only be read.
    estimate : callable
        Tells of an object and a target path what ``write`` would write, and refuses what it
        would refuse. By default it tells nothing, and a dry run adds up the tensors.
    dtypes : tuple of str
        Words for ``--dtype`` that the writer heeds itself. A writer of bases then gets all
        weights as they are, those in NF4 as float32, rounds them once, and shows
        `WriteOptions.watch` what it stores. A writer of adapters rounds in any case; without
        this it is asked for ``f32``, ``f16`` and ``bf16`` only.
    loses : tuple of str
        What the format cannot express, as sentences. A loss that both formats name is none.
    output : {"directory", "file"}
        What the writer makes. A writer of "file" creates one file of the name
        ``publication.file_name``.
    suffixes : tuple of str
        File name endings, in either case, that choose this format for an output.
    requires : tuple of str
        Packages that it needs, as pip calls them.
    """

    kind: ClassVar[str]

    name: str
    summary: str
    sniff: Callable[[Path], bool]
    read: Callable[[Path, Any], Any]
    write: Callable[[Any, AtomicOutput, Any], Any] | None = None
    estimate: Callable[[Any, Path, Any], Forecast | None] = _no_forecast
    dtypes: tuple[str, ...] = ()
    loses: tuple[str, ...] = ()
    output: Literal["directory", "file"] = "directory"
    suffixes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [name for name in self.requires if not any(Distribution.discover(name=name))]

    def check_installed(self) -> None:
        """Raise `MissingDependencyError` with the pip command if a package is missing."""
        if missing := self.missing():
            raise MissingDependencyError(
                f"the {self.name} converter needs {', '.join(missing)}",
                hint=f"run: pip install {' '.join(missing)}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFormat(Format):
    """A format of base models.

    Attributes
    ----------
    stores : {"nf4", "dense", "both"}
        Encodings that the writer can take. Before a writer of "dense" is called, NF4 weights
        are made to dequantize when loaded; before one of "nf4", decoder linears are made to
        quantize. "both" takes them as they come.
    segments : bool
        Whether a writer of NF4 takes stacks of experts as weights in segments; others get them
        dense.
    expert_layouts : tuple of str
        Words for ``--experts``: the layouts in which a writer of NF4 takes stacks of experts,
        "dense" by default.
    pre_tokenizers : bool
        Whether ``write`` heeds `WriteOptions.pre_tokenizer`; without it ``--pre`` is refused.
    takes_config : bool
        Whether ``read`` heeds `ReadOptions.config`; without it ``--config`` is refused.
    method : QuantizationMethod or None
        How the weights are quantized, of a safetensors directory in whose place others are dense.
    """

    kind: ClassVar[str] = "base"

    read: Callable[[Path, ReadOptions], Checkpoint]
    write: Callable[[Checkpoint, AtomicOutput, WriteOptions], WrittenModel] | None = None
    estimate: Callable[[Checkpoint, Path, WriteOptions], Forecast | None] = _no_forecast
    stores: Literal["nf4", "dense", "both"] = "dense"
    segments: bool = False
    expert_layouts: tuple[str, ...] = ()
    pre_tokenizers: bool = False
    takes_config: bool = False
    method: QuantizationMethod | None = None

    def check_pre_tokenizer(self, name: str | None) -> None:
        """Raise `UsageError` for ``--pre`` if the writer knows no such thing."""
        if name is not None and not self.pre_tokenizers:
            raise UsageError(
                f"--pre {name} is for GGUF files, and the output is {self.name}",
                hint="omit it, or write a GGUF file: --to gguf",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFormat(Format):
    """A format of LoRA adapters.

    Attributes
    ----------
    examine : callable or None
        Looks at an adapter as other programs find it, for ``loraformat check``, and refuses
        nothing but damage. Without it an adapter is read, and what that refuses is an error.
    """

    kind: ClassVar[str] = "adapter"

    read: Callable[[Path, AdapterReadOptions], Adapter]
    write: Callable[[Adapter, AtomicOutput, AdapterWriteOptions], None] | None = None
    estimate: Callable[[Adapter, Path, AdapterWriteOptions], Forecast | None] = _no_forecast
    examine: Callable[[Path, AdapterReadOptions], AdapterFacts] | None = None


_Kind = TypeVar("_Kind", bound=Format)
_SAID = {"base": "a base", "adapter": "an adapter"}


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
def _load(name: str) -> Format:
    entry = _entry_points()[name]
    try:
        converter = entry.load()
    except Exception as error:  # a stranger's package may fail in any way
        raise LoraFormatError(
            f"the converter {name!r} ({entry.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}",
            hint="update or uninstall the package it comes from",
        ) from error
    if not isinstance(converter, Format) or converter.name != name:
        raise LoraFormatError(f"{entry.value} is not a Format named {name!r}")
    return converter


def all_converters() -> list[Format]:
    """Return every installed converter, sorted by name."""
    return [_load(name) for name in sorted(_entry_points())]


def quantization_methods() -> dict[str, QuantizationMethod]:
    """Return the quantization methods that converters read, by the converter's name."""
    bases = [one for one in all_converters() if isinstance(one, BaseFormat)]
    return {one.name: one.method for one in bases if one.method is not None}


def get(name: str) -> Format:
    """Return a converter by name.

    Raises
    ------
    UsageError
        If there is none of that name.
    MissingDependencyError
        If a package that it needs is not installed.
    """
    if name not in _entry_points():
        known = ", ".join(sorted(_entry_points()))
        raise UsageError(f"unknown format {name!r}, wanted one of {known}")
    converter = _load(name)
    converter.check_installed()
    return converter


def sniff(path: Path, kind: type[Format] = Format) -> Format:
    """Return the converter that recognises a path by its content.

    Parameters
    ----------
    path : Path
    kind : {BaseFormat, AdapterFormat}, optional
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
    kinds = {converter.kind for converter in known}
    if "adapter" not in kinds:
        refuse_foreign_adapter(path, recognised=bool(known))
    if len(known) > 1:
        known = [converter for converter in known if isinstance(converter, kind)] or known
    if len(known) == 1:
        known[0].check_installed()
        return known[0]
    if known:
        names = " and ".join(converter.name for converter in known)
        hint = "choose one with --from"
        if len(kinds) > 1:  # most verbs have no --from
            hint = (
                "it contains a model and an adapter: move the adapter's files "
                "(adapter_config.json, adapter_model.*) to a directory of their own"
            )
        raise UnsupportedError(f"looks like {names}", path=path, hint=hint)
    raise UnsupportedError(
        f"contains no model in a known format ({', '.join(sorted(_entry_points()))})",
        path=path,
        hint=_missing(path),
    )


def _missing(path: Path) -> str:
    if path.is_dir():
        return "a model directory holds .safetensors files and a config.json"
    if path.is_file() and not path.stat().st_size:
        return "it is empty; download or copy it again"
    return "its first bytes match no known format; download or copy it again"


def _recognises(converter: Format, path: Path) -> bool:
    try:
        return converter.sniff(path)
    except Exception as error:  # a stranger's package may fail in any way
        raise LoraFormatError(
            f"the converter {converter.name!r} fails to detect the format: "
            f"{type(error).__name__}: {error}",
            path=path,
            hint="give the format with --from, or update the package",
        ) from error


def for_output(path: Path, name: str | None, kind: type[_Kind], default: str) -> _Kind:
    """Return the converter for an output: by name, else by suffix, else the default.

    Parameters
    ----------
    path : Path
    name : str or None
        What the user said with ``--to``.
    kind : {BaseFormat, AdapterFormat}
    default : str
        Name of the format where neither says one.

    Raises
    ------
    UsageError
        If that format cannot be written, or is of the other kind.
    """
    converter = get(name or _by_suffix(path, kind) or default)
    if not isinstance(converter, kind):
        raise UsageError(
            f"format {converter.name!r} is for {_SAID[converter.kind]}, and this is "
            f"{_SAID[kind.kind]}"
        )
    if converter.write is None:
        raise UsageError(f"format {converter.name!r} can be read but not written")
    return converter


def _by_suffix(path: Path, kind: type[Format]) -> str | None:
    writers = [c for c in all_converters() if isinstance(c, kind) and c.write is not None]
    for converter in writers:
        if path.name.lower().endswith(tuple(map(str.lower, converter.suffixes))):
            return converter.name
    if _FILE_SUFFIX.fullmatch(path.suffix) and not path.is_dir():
        known = [suffix for converter in writers for suffix in converter.suffixes]
        near = get_close_matches(path.suffix.lower(), known, 1)
        meant = f"did you mean {printable(path.with_suffix(near[0]))}? Else " if near else ""
        raise UsageError(
            f"no installed converter writes {_SAID[kind.kind]} as {path.suffix} file",
            hint=f"{meant}give a directory, or the format with --to",
        )
    return None
