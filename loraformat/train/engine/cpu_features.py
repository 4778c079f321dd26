"""What kind of processor this is, as far as it decides how to multiply."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["processor_words"]


@cache
def processor_words() -> frozenset[str]:
    """Return the words that Linux says of the first processor: its maker, its flags, and more.

    Empty elsewhere.

    Examples
    --------
    >>> "no such flag" in processor_words()
    False
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    return frozenset(cpuinfo.read_text().split("\n\n")[0].split())
