"""A bounds-checked cursor in a GGUF header."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from loraformat.errors import InputError, printable

__all__ = ["MAX_HEAD_BYTES", "Cursor"]

#: Keys, values and list of tensors together: four times the largest vocabulary and its tokenizer.
MAX_HEAD_BYTES = 128 << 20
_CHUNK = 1 << 18
_MOST_AT_ONCE = 1 << 22
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Cursor:
    """A place ``at`` in the head, of which ``data`` has been read.

    ``read`` returns the bytes between two positions of the file.
    """

    def __init__(
        self, read: Callable[[int, int], bytes | memoryview], nbytes: int, path: Path
    ) -> None:
        self._read, self.nbytes, self.path = read, nbytes, path
        self.data = bytearray()
        self.at = 0

    def fail(self, problem: str, *, hint: str | None = None) -> InputError:
        """Return an error that names the file."""
        return InputError(problem, path=self.path, hint=hint)

    def need(self, end: int, what: str) -> None:
        """Have the bytes up to ``end``."""
        have = len(self.data)
        if end <= have:
            return
        if end > self.nbytes:
            raise self.fail(
                f"ends at byte {self.nbytes} inside {what}, which needs {end - self.nbytes} more",
                hint="download or copy it again",
            )
        if end > MAX_HEAD_BYTES:
            raise self.fail(
                f"{what} would end at byte {end}, and a head may have {MAX_HEAD_BYTES} bytes"
            )
        wanted = min(max(end, have + _CHUNK), self.nbytes, MAX_HEAD_BYTES)
        for begin in range(have, wanted, _MOST_AT_ONCE):
            self.data += self._read(begin, min(begin + _MOST_AT_ONCE, wanted))

    def u32(self, what: str) -> int:
        """Read a number of 4 bytes; ``what`` it is for, for messages."""
        return self._number(_U32, what)

    def u64(self, what: str) -> int:
        """Read a number of 8 bytes."""
        return self._number(_U64, what)

    def _number(self, layout: struct.Struct, what: str) -> int:
        begin, _ = self.skip(layout.size, what)
        return int(layout.unpack_from(self.data, begin)[0])

    def skip(self, nbytes: int, what: str) -> tuple[int, int]:
        """Go over bytes and return where they lie."""
        begin = self.at
        self.need(begin + nbytes, what)
        self.at += nbytes
        return begin, self.at

    def name(self, limit: int, what: str) -> str:
        """Read a key or a tensor's name."""
        length = self.u64(what)
        if not 0 < length <= limit:
            raise self.fail(f"{what} has a name of {length} bytes, wanted 1 to {limit}")
        begin, end = self.skip(length, what)
        raw = bytes(self.data[begin:end])
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} has a name that is not UTF-8: {printable(raw)}") from None
        if min(text) < " " or "\x7f" in text:
            raise self.fail(f"{what} has a name with control characters: {printable(text)}")
        return text

    def bytes_so_far(self) -> bytearray:
        """Return all bytes before the place, and forget those behind it."""
        del self.data[self.at :]
        return self.data
