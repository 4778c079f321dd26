"""Markdown escaping of untrusted text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["code", "fence", "fold", "json_block", "link", "numbers", "plain", "table"]

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&@:-])")
_CLEAN = re.compile(r"[\w.\-/+@=,% ]{1,200}", re.ASCII)
_LONGEST = 300


def plain(text: object) -> str:
    r"""Return text on one line with Markdown and HTML characters escaped.

    Examples
    --------
    >>> plain("a|b <script>\n# x")
    'a\\|b &lt;script&gt; \\# x'
    """
    line = _one_line(text)
    escaped = _MARKUP.sub(r"\\\1", line)
    return escaped.replace("\\&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(text: object) -> str:
    r"""Return a code span; escaped text if it contains more than name characters.

    Examples
    --------
    >>> code("q_proj"), code("`x`|y")
    ('`q_proj`', '\\`x\\`\\|y')
    """
    line = _one_line(text)
    return f"`{line}`" if _CLEAN.fullmatch(line) and line.strip() == line else plain(line)


def _one_line(text: object) -> str:
    words = "".join(
        " " if character.isspace() else character
        for character in str(text)
        # Controls, and what turns the direction of writing around or hides.
        if character.isspace() or unicodedata.category(character)[0] != "C"
    )
    line = " ".join(words.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def link(repo: str) -> str:
    """Return a link to a repository on the Hub."""
    shown = repo.replace("_", "\\_")
    return f"[{shown}](https://huggingface.co/{repo})"


def fence(text: str, language: str = "") -> str:
    """Return a code block that its content cannot close.

    Examples
    --------
    >>> print(fence("x = 1", "python"))
    ```python
    x = 1
    ```
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def json_block(value: Any) -> str:
    """Return JSON as a code block, in ASCII: nothing in it is invisible."""
    return fence(json.dumps(value, indent=2, ensure_ascii=True, default=str), "json")


def fold(summary: str, content: str) -> str:
    """Return content in a collapsed section under a trusted summary line."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are already Markdown.

    Examples
    --------
    >>> print(table(["a"], [["1"]]))
    | a |
    | --- |
    | 1 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers(values: Iterable[float]) -> str:
    """Return at most eight numbers with six digits each.

    Examples
    --------
    >>> numbers([8, 0.25]), numbers(range(20))
    ('8, 0.25', '0, 1, 2, 3, 4, 5, 6, 7, …')
    """
    shown = [f"{value:.6g}" for value in values]
    return ", ".join(shown[:8] + (["…"] if len(shown) > 8 else []))
