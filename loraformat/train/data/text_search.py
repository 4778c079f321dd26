"""What two texts have in common at an end; compared in C, as characters in Python are not."""

from __future__ import annotations

__all__ = ["common_prefix", "common_suffix"]


def common_prefix(one: str, other: str) -> str:
    """Return what both begin with.

    Examples
    --------
    >>> common_prefix("a turn", "a tool")
    'a t'
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return one[:low]


def common_suffix(one: str, other: str) -> str:
    """Return what both end with.

    Examples
    --------
    >>> common_suffix("<s>USER: ", "</s>USER: ")
    's>USER: '
    """
    return common_prefix(one[::-1], other[::-1])[::-1]
