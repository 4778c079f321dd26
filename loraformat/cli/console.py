"""What verbs share on a terminal: sizes, tables, progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from loraformat.storage.byte_sizes import parse_size

__all__ = [
    "ByteSize",
    "Resumable",
    "clean",
    "echo_json",
    "json_option",
    "progress_bar",
    "quiet_option",
    "say",
    "size",
    "table",
]


def _silence_hub(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    if quiet:  # huggingface_hub, which has bars of its own, reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


quiet_option = click.option(
    "--quiet", "-q", is_flag=True, callback=_silence_hub, help="Print errors only."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


class Resumable(KeyboardInterrupt):
    """An interruption after which the same command goes on, with ``--resume``."""


class ByteSize(click.ParamType[int]):
    """A size such as 2GB, 500MB or 1GiB, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def size(nbytes: float) -> str:
    """Return a size for people.

    Examples
    --------
    >>> size(2_200_000), size(12)
    ('2.2 MB', '12 B')
    """
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("kB", 1)):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.3g} {unit}"
    return f"{nbytes:.0f} B"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table; columns of numbers are aligned to the right.

    Examples
    --------
    >>> print(table(["name", "bytes"], [["a", 10], ["bc", 5]]))
    name  bytes
    a        10
    bc        5
    """
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    right = [
        bool(body) and all(re.match(r"[-\d.<]", row[i] or "-") for row in body)
        for i in range(len(head))
    ]
    lines = []
    for row in [list(head), *body]:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())
    return "\n".join(lines)


def clean(text: str) -> str:
    r"""Return text with control characters escaped: a stranger's words must not move a cursor.

    Examples
    --------
    >>> clean("rank\x1b[2J\n")
    'rank\\x1b[2J\\n'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Print lines on stdout, each of them `clean`."""
    click.echo("\n".join(map(clean, text.split("\n"))))


def echo_json(schema: str, members: dict[str, Any]) -> None:
    """Print one JSON object with its schema's name and version."""
    click.echo(
        json.dumps({"schema": f"loraformat.{schema}", "schema_version": 1, **members}, indent=2)
    )


@contextmanager
def progress_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr.

    Yields
    ------
    callable
        To be called with the bytes done and the bytes in total.
    """
    if quiet:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit="B", unit_scale=True, total=0, delay=0.5, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
