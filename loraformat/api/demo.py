"""``loraformat.demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.demo.pipeline import DemoReport

__all__ = ["demo"]


def demo(
    directory: str | Path = "loraformat-demo", *, force: bool = False, progress: bool = False
) -> DemoReport:
    """Run every verb on the small model and the adapters that ship with loraformat.

    Parameters
    ----------
    directory : str or Path
        Where models and adapters go.
    force : bool
        Replace the output of an earlier run.
    progress : bool
        Print a line about each step on stderr.

    Returns
    -------
    DemoReport

    Raises
    ------
    LoraFormatError
        If a step fails.
    """
    import sys

    from loraformat.demo.pipeline import run_demo

    def say(line: str) -> None:
        if progress:
            sys.stderr.write(f"... {line}\n")

    return run_demo(Path(directory), force=force, say=say)
