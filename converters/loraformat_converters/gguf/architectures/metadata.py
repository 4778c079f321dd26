"""Metadata of GGUF files and members of ``config.json``: rows that are read in both directions.

A row writes what llama.cpp needs of a config, or refuses what llama.cpp would compute
differently; from a file it reads the members of ``config.json`` that its keys imply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.architectures.config import LARGEST, MAX_EXPERTS, Config
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = [
    "MetadataBuilder", "MetadataRow", "bounded", "either", "experts", "float_tensor", "head_size",
    "implied", "number", "only", "short", "uint",
]  # fmt: skip

Members = dict[str, Any]


class MetadataBuilder(dict[str, GGUFValue]):
    """Metadata being collected, under one architecture's prefix.

    Examples
    --------
    >>> keys = MetadataBuilder("llama")
    >>> keys.uint("block_count", 2)
    >>> keys
    {'llama.block_count': GGUFValue(UINT32, 2)}
    """

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.architecture = architecture

    def uint(self, key: str, value: int) -> None:
        """Add a UINT32."""
        self._add(key, ValueType.UINT32, value)

    def float(self, key: str, value: float) -> None:
        """Add a FLOAT32, rounded to nearest even."""
        self._add(key, ValueType.FLOAT32, value)

    def flag(self, key: str, value: bool) -> None:
        """Add a BOOL."""
        self._add(key, ValueType.BOOL, value)

    def text(self, key: str, value: str) -> None:
        """Add a STRING."""
        self._add(key, ValueType.STRING, value)

    def flags(self, key: str, values: Sequence[bool]) -> None:
        """Add an array of BOOL."""
        self[f"{self.architecture}.{key}"] = GGUFValue.of_array(ValueType.BOOL, values)

    def _add(self, key: str, kind: ValueType, value: Any) -> None:
        try:
            self[f"{self.architecture}.{key}"] = GGUFValue.of(kind, value)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{key} is {printable(value)}, which GGUF cannot store: {printable(error)}"
            ) from None


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """One fact of a model, in either form: a function for each direction.

    Attributes
    ----------
    write : callable
        Adds keys for a config, or raises `UnsupportedError` if llama.cpp would compute something
        else than the model, `InputError` if the config is damaged.
    read : callable
        Adds the members that a file implies to those of the rows before, or raises `InputError`.
    tensors : callable
        Returns small float32 tensors that stand for hyperparameters, by GGUF name.
    """

    write: Callable[[Config, MetadataBuilder], None] = lambda config, keys: None
    read: Callable[[GGUFFile, Members], None] = lambda gguf, members: None
    tensors: Callable[[Config], dict[str, list[float]]] = lambda config: {}


def uint(
    key: str,
    member: str,
    default: int | Callable[[Members], int] | None = None,
    most: int = LARGEST,
) -> MetadataRow:
    """Return the row of a positive whole number.

    Parameters
    ----------
    key, member : str
        Its names in GGUF, behind the architecture's, and in ``config.json``.
    default : int or callable, optional
        What a file without the key means; may follow from the members before.
    most : int
    """

    def write(config: Config, keys: MetadataBuilder) -> None:
        keys.uint(key, config.integer(member, most=most))

    def read(gguf: GGUFFile, members: Members) -> None:
        usual = default(members) if callable(default) else default
        members[member] = bounded(gguf, f"{{arch}}.{key}", most, usual)

    return MetadataRow(write, read)


def number(
    key: str, member: str, default: float | None = None, *, optional: bool = False
) -> MetadataRow:
    """Return the row of a finite number; an optional one may be missing on either side."""

    def write(config: Config, keys: MetadataBuilder) -> None:
        if not optional or config.get(member) is not None:
            keys.float(key, config.number(member))

    def read(gguf: GGUFFile, members: Members) -> None:
        value = short(gguf.number(f"{{arch}}.{key}", 0.0 if optional else default))
        members[member] = None if optional and not value else value

    return MetadataRow(write, read)


def only(member: str, *wanted: Any, why: str, implied: bool = True) -> MetadataRow:
    """Return the row of a member that may have no other value than llama.cpp computes with.

    Parameters
    ----------
    member : str
    *wanted
        Its values; the first is what a file implies.
    why : str
        The reason for users whose model has another one.
    implied : bool
        Whether a config that is made from a file has the member.
    """

    def write(config: Config, keys: MetadataBuilder) -> None:
        config.only(member, *wanted, why=why)

    def read(gguf: GGUFFile, members: Members) -> None:
        members[member] = wanted[0]

    return MetadataRow(write, read) if implied else MetadataRow(write)


def implied(**values: Any) -> MetadataRow:
    """Return the row of members that a file implies; a callable value is asked of the file."""

    def read(gguf: GGUFFile, members: Members) -> None:
        members |= {
            member: value(gguf) if callable(value) else value for member, value in values.items()
        }

    return MetadataRow(read=read)


def either(mixture: Sequence[MetadataRow], dense: Sequence[MetadataRow]) -> MetadataRow:
    """Return the rows of models with experts, and of those without, as one."""

    def write(config: Config, keys: MetadataBuilder) -> None:
        for row in mixture if config.experts else dense:
            row.write(config, keys)

    def read(gguf: GGUFFile, members: Members) -> None:
        counted = f"{gguf.architecture}.expert_count" in gguf.metadata
        for row in mixture if counted else dense:
            row.read(gguf, members)

    return MetadataRow(write, read)


def experts(member: str) -> MetadataRow:
    """Return the row of the number of experts, by its member, and of those used for a token."""

    def write(config: Config, keys: MetadataBuilder) -> None:
        keys.uint("expert_count", config.experts)
        keys.uint("expert_used_count", config.integer("num_experts_per_tok", most=config.experts))

    def read(gguf: GGUFFile, members: Members) -> None:
        count = members[member] = bounded(gguf, "{arch}.expert_count", MAX_EXPERTS)
        members["num_experts_per_tok"] = bounded(gguf, "{arch}.expert_used_count", count)

    return MetadataRow(write, read)


def bounded(gguf: GGUFFile, key: str, most: int = LARGEST, default: int | None = None) -> int:
    """Return a positive whole number of a file's metadata.

    Raises
    ------
    InputError
        If it is not one; a number that differs from layer to layer is not, either.
    """
    value = gguf.integer(key, default)
    if not 0 < value <= most:
        raise InputError(f"{key.replace('{arch}', gguf.architecture)} is {value}", path=gguf.path)
    return value


def head_size(gguf: GGUFFile, members: Members) -> int:
    """Return the dimensions of a head.

    Raises
    ------
    InputError
        If keys and values have different ones.
    """
    usual = members["hidden_size"] // members["num_attention_heads"]
    size = bounded(gguf, "{arch}.attention.key_length", default=usual)
    values = gguf.integer("{arch}.attention.value_length", size)
    if values != size:
        raise InputError(f"values have {values} dimensions and keys {size}", path=gguf.path)
    return size


def short(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-06, not 9.999999974752427e-07.

    Examples
    --------
    >>> short(9.999999974752427e-07)
    1e-06
    """
    import numpy

    return float(str(numpy.float32(value)))


def float_tensor(gguf: GGUFFile, name: str) -> list[float]:
    """Return the numbers of a small F32 tensor.

    Raises
    ------
    InputError
        If it is none, or has more than 4096 numbers.
    """
    import numpy

    tensor = gguf.tensors[name]
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise InputError(f"tensor {name} is not an F32 vector", path=gguf.path)
    values = numpy.frombuffer(gguf.load(name), dtype="<f4")
    if not numpy.isfinite(values).all():
        raise InputError(f"tensor {name} holds numbers that are not finite", path=gguf.path)
    return [short(value) for value in values]
