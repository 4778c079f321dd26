"""Plot output: file types and a colour-blind-safe palette."""

from __future__ import annotations

import os
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.errors import MissingDependencyError, OutputError, UsageError, printable
from loraformat.storage.atomic_file import AtomicFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_label", "check_picture", "colors", "save_picture"]

_SUFFIXES = (".png", ".svg", ".pdf")
#: How such files begin: an SVG file after its XML declaration.
_SIGNATURES = (b"\x89PNG\r\n", b"<svg", b"%PDF-")
_HEAD_BYTES = 1024
#: Paul Tol's "muted" scheme, made for colour-blind readers; the strongest first.
_MUTED = (
    "#332288", "#CC6677", "#117733", "#88CCEE", "#AA4499", "#DDCC77", "#44AA99", "#882255",
    "#999933",
)  # fmt: skip


def check_picture(path: str | Path) -> None:
    """Raise plotting errors before anything is computed.

    Raises
    ------
    UsageError
        If the suffix names no format: png, svg or pdf.
    MissingDependencyError
        If matplotlib is not installed.
    OutputError
        If something stands there that is not a picture; an older picture is replaced.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UsageError(f"the plot must be one of {', '.join(_SUFFIXES)}, not {printable(path)}")
    if find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "a plot needs matplotlib", hint="run: pip install 'loraformat[plot]'"
        )
    _refuse_existing(Path(path))


def _refuse_existing(target: Path) -> None:
    """Refuse to replace anything but a picture, least of all through a link."""
    if os.path.lexists(target) and not _is_picture(target):
        raise OutputError(
            "exists, is not a picture and will not be replaced",
            path=target,
            hint="choose another file",
        )


def _is_picture(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or any(sign in head for sign in _SIGNATURES)


def save_picture(figure: Figure, path: str | Path) -> None:
    """Save a figure atomically in the format of the path's suffix, replacing an older picture."""
    target = Path(path)
    data = BytesIO()
    figure.savefig(data, format=target.suffix[1:].lower())
    with _PicturePublication(target, plan="picture", force=True) as stage:
        stage.write(stage.file_name, data.getvalue())
        stage.commit()


class _PicturePublication(AtomicFile):
    def _refuse_existing(self) -> None:
        _refuse_existing(self.target)


def colors(count: int) -> list[Any]:
    """Return a number of colours: a fixed palette, or a colour map for many."""
    if count <= len(_MUTED):
        return list(_MUTED[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](i / count) for i in range(count)]


def as_label(text: str) -> str:
    r"""Return an untrusted name as a plot label, escaped for matplotlib.

    Examples
    --------
    >>> as_label("up_proj"), as_label("a$b"), as_label("_hidden")
    ('up_proj', 'a\\$b', ' _hidden')
    """
    plain = printable(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
