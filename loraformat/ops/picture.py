"""What all pictures share: which files they go to, and colours that everybody can tell apart."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraformat.errors import MissingDependencyError, UsageError, printable

__all__ = ["as_label", "check_picture", "colors"]

_SUFFIXES = (".png", ".svg", ".pdf")
#: Paul Tol's "muted" scheme, made for colour-blind readers; the strongest first.
_MUTED = (
    "#332288", "#CC6677", "#117733", "#88CCEE", "#AA4499", "#DDCC77", "#44AA99", "#882255",
    "#999933",
)  # fmt: skip


def check_picture(path: str | Path) -> None:
    """Raise what drawing would raise, before anything is computed.

    Parameters
    ----------
    path : str or Path
        Its suffix chooses the format: png, svg or pdf.

    Raises
    ------
    UsageError
        If the suffix names no format.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UsageError(f"a picture is one of {', '.join(_SUFFIXES)}, not {printable(path)}")
    if find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "a plot needs matplotlib", hint="run: pip install 'loraformat[plot]'"
        )


def colors(count: int) -> list[Any]:
    """Return so many colours of matplotlib: a fixed few, or many from dark to light.

    Parameters
    ----------
    count : int
    """
    if count <= len(_MUTED):
        return list(_MUTED[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](i / count) for i in range(count)]


def as_label(text: str) -> str:
    r"""Return a stranger's name as a label: no formula begins in it, and no legend leaves it out.

    Parameters
    ----------
    text : str

    Examples
    --------
    >>> as_label("up_proj"), as_label("a$b"), as_label("_hidden")
    ('up_proj', 'a\\$b', ' _hidden')
    """
    plain = printable(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
