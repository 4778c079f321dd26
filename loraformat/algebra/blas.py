"""How many threads numpy's matrix products use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

__all__ = ["one_blas_thread"]


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let each matrix product run on the thread that asks for it, in the whole process.

    For work that is spread over threads already: BLAS's own threads would wait for each other
    after every product, and two callers at once for the one pool that they share.

    Examples
    --------
    >>> import numpy
    >>> with one_blas_thread():
    ...     numpy.ones((2, 2)) @ numpy.ones((2, 1))
    array([[2.],
           [2.]])
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield
