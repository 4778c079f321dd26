"""GGUF model metadata from a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.types import ValueType
from loraformat_converters.gguf.values import GGUFValue

__all__ = ["MetadataBuilder"]


class MetadataBuilder(dict[str, GGUFValue]):
    """Metadata being collected, under one architecture's prefix.

    Parameters
    ----------
    architecture : str

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
