"""Progress of a public function: a callable, or a bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

__all__ = ["Progress", "reported"]

#: ``True`` for a bar on stderr, or a function that is called with the amounts done and in total.
Progress: TypeAlias = bool | Callable[[int, int], None]


@contextmanager
def reported(
    progress: Progress, label: str, unit: str = "B"
) -> Iterator[Callable[[int, int], None]]:
    """Yield the function that is to be told.

    Parameters
    ----------
    progress : bool or callable
    label : str
        In front of the bar.
    unit : str
        What is counted; ``B`` for bytes.

    Yields
    ------
    callable
        To be called with the amounts done and in total.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, unit_scale=unit == "B", total=0, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
