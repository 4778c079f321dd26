"""The files of a GGUF model, single or split.

``llama-gguf-split`` and gguf-py name them ``model-00001-of-00003.gguf`` and write
``split.no``, ``split.count`` and ``split.tensors.count`` into each.
"""

from __future__ import annotations

import re
from pathlib import Path

from loraformat.errors import InputError, printable
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedBytes
from loraformat_converters.gguf.container.cursor import MAX_HEAD_BYTES
from loraformat_converters.gguf.container.header import MAX_KEYS, MAX_TENSORS, parse_header

__all__ = ["SplitFile", "open_parts"]

MAX_PARTS = 512
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


class SplitFile:
    """One file on the disk and its head."""

    def __init__(self, folder: SafeDirectory, name: str) -> None:
        self.file = MappedBytes(folder, name)
        self.path = self.file.path
        try:
            self.header = parse_header(self.file.read_between, self.file.nbytes, self.path)
            self.keys = len(self.header.metadata)
            self.file.map()
        except BaseException:
            self.file.abandon()
            raise

    def number_of(self, key: str, default: int) -> int:
        """Return a whole number from the metadata."""
        value = self.header.metadata.get(key)
        if value is None:
            return default
        if not value.type.is_integer:
            raise InputError(f"{key} is {value.described}, wanted an integer", path=self.path)
        return int(value.value)


def open_parts(path: Path) -> list[SplitFile]:
    """Open a file, and if it was split all its parts, in order, whichever is named.

    Raises
    ------
    InputError
        If a part is missing or damaged, or they do not belong together.
    """
    folder = SafeDirectory(path.parent)
    named = SplitFile(folder, path.name)
    try:
        count = named.number_of("split.count", 1)
        names = _names(named, count)
    except BaseException:
        named.file.abandon()
        raise
    if count < 2:
        return [named]
    named.file.close()  # it is opened again, in its place
    parts: list[SplitFile] = []
    try:
        for number, name in enumerate(names):
            if not folder.has(name):
                raise InputError(
                    f"part {number + 1} of {count} is missing: {printable(name)}",
                    path=path,
                    hint="download all parts into one directory",
                )
            parts.append(SplitFile(folder, name))
            _check_part(parts, number, count)
        _check_count(parts)
    except BaseException:
        for part in parts:
            part.file.abandon()
        raise
    return parts


def _names(named: SplitFile, count: int) -> list[str]:
    match = _NAME.fullmatch(named.path.name)
    if count > MAX_PARTS:
        raise InputError(
            f"claims to be split into {count} parts, more than {MAX_PARTS}", path=named.path
        )
    if count > 1 and (match is None or int(match["count"]) != count):
        raise InputError(
            f"is one of {count} parts, and its name does not say which",
            path=named.path,
            hint=f"give the parts their names again: NAME-00001-of-{count:05}.gguf and so on",
        )
    stem = match["stem"] if match else ""
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _check_part(parts: list[SplitFile], number: int, count: int) -> None:
    """Check the last part's own words, and that all together are within the bounds of one."""
    part = parts[-1]
    said = part.number_of("split.no", -1), part.number_of("split.count", -1)
    if said != (number, count):
        raise InputError(
            f"says that it is part {said[0] + 1} of {said[1]}, and its name says part "
            f"{number + 1} of {count}",
            path=part.path,
        )
    tensors = sum(len(part.header.tensors) for part in parts)
    keys = sum(part.keys for part in parts)
    head_bytes = sum(part.header.data_start for part in parts)
    if tensors > MAX_TENSORS or keys > MAX_KEYS or head_bytes > MAX_HEAD_BYTES:
        raise InputError(
            f"and the parts before it have {tensors} tensors, {keys} keys and {head_bytes} bytes "
            f"of both, more than {MAX_TENSORS}, {MAX_KEYS} or {MAX_HEAD_BYTES}",
            path=part.path,
        )
    if number:  # what is said of the model stands in the first
        part.header.metadata.clear()


def _check_count(parts: list[SplitFile]) -> None:
    claimed = parts[0].number_of("split.tensors.count", -1)
    found = sum(len(part.header.tensors) for part in parts)
    if claimed not in (-1, found):
        raise InputError(
            f"split.tensors.count is {claimed}, and its {len(parts)} parts hold {found}",
            path=parts[0].path,
        )
