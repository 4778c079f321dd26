"""Matrix products by the library that is fastest for them.

For float32 torch calls MKL, which on AMD's processors leaves a tenth to a half of the speed:
110 to 190 GF/s on two cores where oneDNN, which torch brings as well, reaches 180 to 210 (Zen 4,
128 to 512 tokens). Elsewhere, and for other types, torch's own choice stands.

oneDNN has fast kernels for a second factor that lies in one piece, in either order. Part of a wider
matrix it multiplies by a plain loop, 200 to 4000 times slower: such a part is copied first.
"""

from __future__ import annotations

from functools import cache

import torch

from loraformat.train.engine.buffers import workspace
from loraformat.train.engine.cpu_features import processor_words

__all__ = ["even_rows", "times", "times_transposed"]

#: Fewer rows than this are not worth a copy.
_FEW_ROWS = 32


def times_transposed(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x wᵀ, maybe in `out`; no gradient.

    Parameters
    ----------
    x : torch.Tensor
        (m, k).
    w : torch.Tensor
        (n, k), of the same dtype.
    out : torch.Tensor, optional
        (m, n), of any floating dtype.

    Examples
    --------
    >>> times_transposed(torch.ones(2, 3), torch.ones(1, 3))
    tensor([[3.],
            [3.]])
    """
    if out is None or out.dtype != x.dtype:
        y = _onednn(x, w) if _suits_onednn(x) else x @ w.T
        return y if out is None else out.copy_(y)
    if _suits_onednn(x):
        return out.copy_(_onednn(x, w))
    return torch.mm(x, w.T, out=out)


def times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return x w of two matrices of one dtype; no gradient.

    Examples
    --------
    >>> times(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    return _onednn(x, w.T) if _suits_onednn(x) else x @ w


def even_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a matrix with one more row, of zeros, if it has an odd number and more than a few.

    An odd number of rows costs oneDNN a fifth to a third of its speed. What it does not multiply
    is returned as it is.

    Examples
    --------
    >>> x = torch.ones(33, 2, dtype=torch.bfloat16)
    >>> even_rows(x).shape, even_rows(x[:1]).shape
    (torch.Size([34, 2]), torch.Size([1, 2]))
    """
    if len(x) % 2 == 0 or len(x) < _FEW_ROWS or x.device.type != "cpu":
        return x
    if x.dtype not in (torch.bfloat16, torch.float16) and not _suits_onednn(x):
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, 1))


def _onednn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, _packed(w), None, "none", [], "")
    return y


def _packed(w: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows or columns lie one after the other: it, or this thread's copy."""
    if w.is_contiguous() or w.T.is_contiguous():
        return w
    w, turned = (w.T, True) if w.stride(0) == 1 else (w, False)
    copy = workspace.take("packed", tuple(w.shape), w.dtype).copy_(w)
    return copy.T if turned else copy


def _suits_onednn(x: torch.Tensor) -> bool:
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_cpu and x.numel() > 0 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """Tell whether float32 products are to go to oneDNN here, whose operator has no public name."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    there = there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and "AuthenticAMD" in processor_words()
