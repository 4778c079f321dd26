"""An open GGUF file, in one part or split into several.

Nothing is read but the heads; a tensor's bytes are a view on the mapped file. A file that
was split (``model-00001-of-00003.gguf``) is one file here, whichever part is named: the
first part has the metadata, each part its own tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.container.header import GGUFTensor
from loraformat_converters.gguf.container.split_files import SplitFile, open_parts
from loraformat_converters.gguf.container.types import ValueType

__all__ = ["GGUFFile", "GGUFTensor", "is_gguf", "open_gguf"]


def is_gguf(path: Path) -> bool:
    """Tell by its first bytes whether a path is a GGUF file."""
    try:
        if not path.is_file():  # opening a FIFO would wait for somebody to write to it
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file, with all its parts if it was split, whichever is named.

    Raises
    ------
    UnsupportedError
        If it is of another version or byte order, or holds a type that is not known.
    InputError
        If it is missing, damaged or hostile, or a part is missing.
    """
    path = Path(path)
    parts = open_parts(path)
    try:
        return GGUFFile(path, parts)
    except BaseException:
        for part in parts:
            part.file.abandon()
        raise


class GGUFFile:
    """An open GGUF file, made by `open_gguf`: the first part's metadata, the tensors of all.

    Both are in file order; ``sources`` are the parts. In the getters ``{arch}`` in a key stands for
    the architecture, as in ``{arch}.block_count``.
    """

    def __init__(self, path: Path, parts: list[SplitFile]) -> None:
        self.path = path
        self.sources = tuple(part.path for part in parts)
        self.version = parts[0].header.version
        self.metadata = parts[0].header.metadata
        self._files = [part.file for part in parts]
        self.tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(parts):
            for entry in part.header.tensors.values():
                if entry.name in self.tensors:
                    raise InputError(
                        f"has the tensor {printable(entry.name)} of an earlier part again",
                        path=part.path,
                    )
                self.tensors[entry.name] = replace(entry, part=number)

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return self.text("general.architecture")

    def load(self, name: str) -> memoryview:
        """Return a tensor's bytes, as they are stored: a read-only view on the mapping."""
        tensor = self._tensor(name)
        file = self._files[tensor.part]
        return file.bytes_between(tensor.offset, tensor.offset + tensor.nbytes)

    def releaser(self, name: str) -> Callable[[], None]:
        """Return a function that gives a tensor's pages back to the kernel."""
        tensor = self._tensor(name)
        span = (tensor.offset, tensor.offset + tensor.nbytes)
        return self._files[tensor.part].range_releaser([span])

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(f"has no tensor {printable(name)}", path=self.path) from None

    def text(self, key: str, default: str | None = None) -> str:
        """Return a STRING."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._not(key, "a STRING")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number, of whatever integer type."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._not(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number, of whatever integer or floating type."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._not(key, "a number")
        if not isfinite(value):
            raise self._wrong(key, f"is {value}, wanted a finite number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return a BOOL."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._not(key, "a BOOL")
        return value

    def array(self, key: str, *item_types: ValueType) -> list[Any]:
        """Return an array's items; only of the given types, if any are given.

        Raises
        ------
        InputError
            If it is missing, no array, of other items, or holds text that is not UTF-8.
        """
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._not(key, "an array")
        if item_types and self.metadata[self._full(key)].item_type not in item_types:
            wanted = " or ".join(kind.name for kind in item_types)
            raise self._not(key, f"an array of {wanted}")
        return value

    def _full(self, key: str) -> str:
        return key.replace("{arch}", self.architecture) if "{arch}" in key else key

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self._full(key))
        if value is None:
            if default is None:
                raise self._wrong(key, "is missing")
            return default
        try:
            return value.value
        except InputError as error:
            raise self._wrong(key, error.problem) from None

    def _not(self, key: str, wanted: str) -> InputError:
        described = self.metadata[self._full(key)].described
        return self._wrong(key, f"is {described}, wanted {wanted}")

    def _wrong(self, key: str, problem: str) -> InputError:
        return InputError(f"key {printable(self._full(key))} {problem}", path=self.path)

    def close(self) -> None:
        """Unmap the file.

        Raises
        ------
        FileChangedError
            If it changed while it was open.
        """
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({printable(self.path)}, {len(self.tensors)} tensors)"
