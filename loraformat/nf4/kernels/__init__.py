"""NF4 kernels in C and in numpy, with identical results.

`active` chooses: the fastest one by default, or what the environment variable
``LORAFORMAT_KERNEL`` names: ``auto``, ``c`` (the fastest compiled one), ``scalar``, ``avx2``,
``avx512``, ``neon`` or ``numpy``.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from loraformat.errors import UsageError
from loraformat.nf4.kernels import native
from loraformat.nf4.kernels.reference import ReferenceKernel
from loraformat.tensors.arrays import Array

if TYPE_CHECKING:
    from loraformat.nf4.quantized import NF4

__all__ = ["CHOICES", "VARIABLE", "Kernel", "active", "available", "get"]

VARIABLE = "LORAFORMAT_KERNEL"
CHOICES = ("auto", "c", *native.ISAS, "numpy")


class Kernel(Protocol):
    """Work on one piece of a tensor, in the calling thread.

    Every array is contiguous and of the length that its neighbours imply; nothing is
    checked here. `blocks` below means ``ceil(x.size / block_size)``.
    """

    name: str

    def quantize(self, x: Array, block_size: int, packed: Array, absmax: Array) -> bool:
        """Fill `packed` uint8[ceil(n / 2)] and `absmax` float32[blocks]; False if not finite."""

    def sum_scales(self, absmax: Array, sums: Array) -> None:
        """Fill `sums` float64[ceil(blocks / 256)] with the sum of each 256, folded in halves."""

    def quantize_scales(
        self, absmax: Array, offset: float, codes: Array, nested_absmax: Array
    ) -> None:
        """Fill `codes` uint8[blocks] and `nested_absmax` float32[ceil(blocks / 256)]."""

    def decode_scales(
        self, codes: Array, nested_absmax: Array, offset: float, start: int, out: Array
    ) -> None:
        """Fill `out` float32 with the absmax of the blocks from number `start` on."""

    def dequantize(
        self, packed: Array, scales: Array, block_size: int, start: int, out: Array, streaming: bool
    ) -> None:
        """Fill `out` with elements from `start` on; ``scales[0]`` is of the block of `start`."""

    def dequantize_rows(self, q: NF4, start: int, stride: int, out: Array) -> None:
        """Fill each row of `out` with elements from ``start + row * stride`` on."""

    def multiply_rows(
        self, q: NF4, start: int, dtype: numpy.dtype[Any], x: Array, out: Array
    ) -> None:
        """Fill `out` float32[tokens, rows] with `x` float32[tokens, columns] times rows.

        Row r is of elements ``start + r * columns`` on, rounded to `dtype`. Only here kernels
        differ, in the last places: numpy adds up in another order.
        """

    def error(self, x: Array, packed: Array, scales: Array, block_size: int, sums: Array) -> None:
        """Fill `sums` float64[2, ceil(n / 4096)] with sums of (x - value)² and of x²."""


def available() -> tuple[str, ...]:
    """List the kernels that this machine can run, slowest first; "numpy" is always there.

    Examples
    --------
    >>> "numpy" in available()
    True
    """
    return ("numpy", *native.supported())


@cache
def get(choice: str = "auto") -> Kernel:
    """Look up one of `CHOICES`; all callers and threads share it.

    Raises `UsageError` if the choice is unknown, or if this machine cannot run it.

    Examples
    --------
    >>> get("numpy").name
    'numpy'
    """
    names = available()
    if choice not in CHOICES:
        raise UsageError(f"{VARIABLE} is {choice!r}, wanted one of {', '.join(CHOICES)}")
    if choice in ("auto", "c"):
        choice = names[-1] if choice == "auto" or len(names) > 1 else choice
    if choice not in names:
        raise UsageError(
            f"{VARIABLE} asks for the {choice!r} kernel; this installation on this CPU has "
            f"{', '.join(names)}",
            hint="unset it, or reinstall where a C compiler is found",
        )
    return ReferenceKernel() if choice == "numpy" else native.NativeKernel(choice)


def active() -> Kernel:
    """Return the kernel that ``LORAFORMAT_KERNEL`` names, else the fastest; raises as `get`.

    Examples
    --------
    >>> active().name in available()
    True
    """
    return get(os.environ.get(VARIABLE) or "auto")
