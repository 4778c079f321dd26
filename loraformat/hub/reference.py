"""Validation of branch and tag names."""

from __future__ import annotations

import re

__all__ = ["is_reference"]

#: ``git check-ref-format``, a hyphen in front (an option to git), and what looks like a commit.
_REFUSED = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|(?:^|/)\.|\.lock(?:/|$)|"
    r"^(?:@|HEAD|[0-9a-f]{40})?$"
)
_LONGEST = 200


def is_reference(name: str) -> bool:
    """Tell whether a branch or a tag may have this name.

    Examples
    --------
    >>> [is_reference(name) for name in ("v1.0", "feature/x", "v1..0", "a b", "", "HEAD")]
    [True, True, False, False, False, False]
    """
    return len(name) <= _LONGEST and _REFUSED.search(name) is None
