"""Parsing of byte sizes such as 2GB or 1GiB."""

from __future__ import annotations

import re

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, _letter: 1000**_power, f"{_letter}IB": 1024**_power}


def parse_size(text: str) -> int:
    """Parse a size and return it in bytes; raises `ValueError` if it is none, or zero.

    Examples
    --------
    >>> parse_size("2GB"), parse_size("1.5 KiB"), parse_size("12")
    (2000000000, 1536, 12)
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?I?B?)\s*", text.upper())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is not a size such as 2GB or 500MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(nbytes: float) -> str:
    """Format a size in bytes for display.

    Examples
    --------
    >>> format_size(2_200_000), format_size(12)
    ('2.2 MB', '12 B')
    """
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("kB", 1)):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.3g} {unit}"
    return f"{nbytes:.0f} B"
