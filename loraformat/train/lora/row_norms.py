"""The norms of a weight with its delta, as DoRA needs them (Liu 2024, equation 5).

W' = m · (W + D) / ‖W + D‖, the norm taken for each output feature. The norm is a constant in
the gradient (section 4.3 there). W is seen tile by tile, so it never lies in memory as a whole;
norms are kept until the factors change, which an optimizer does once per step, so that a
checkpointed layer and accumulated batches cost one pass.
"""

from __future__ import annotations

import torch

from loraformat.train.lora.target_module import TargetModule

__all__ = ["RowNorms", "row_norms"]


def row_norms(site: TargetModule, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return ‖W + scaling · B A‖ for each output feature.

    Parameters
    ----------
    site : TargetModule
        A linear, or an embedding, whose weight is the transpose of what a linear has.
    a : torch.Tensor
        float32 (r, in).
    b : torch.Tensor
        float32 (out, r).
    scaling : float

    Returns
    -------
    torch.Tensor
        float32 (out,).
    """
    with torch.no_grad():
        if site.kind == "embedding":
            squares = torch.zeros(len(b), dtype=torch.float64, device=b.device)
            for first, last, tile in site.tiles(0):
                moved = torch.addmm(tile, a[:, first:last].T, b.T, alpha=scaling)
                squares += moved.square().sum(0, dtype=torch.float64)
            return squares.sqrt().to(b.dtype)
        norms = torch.empty(len(b), dtype=b.dtype, device=b.device)
        for first, last, tile in site.tiles(0):
            moved = torch.addmm(tile, b[first:last], a, alpha=scaling)
            torch.linalg.vector_norm(moved, dim=1, out=norms[first:last])
        return norms


class RowNorms:
    """`row_norms` of one site, computed again when the factors are others.

    Parameters
    ----------
    site : TargetModule
    """

    def __init__(self, site: TargetModule) -> None:
        self._site = site
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._norms: torch.Tensor | None = None

    def __call__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the norms for these factors."""
        known = self._factors
        # Compared by value: an optimizer may write past torch's version counters.
        if (
            self._norms is None
            or known is None
            or not (torch.equal(known[0], a) and torch.equal(known[1], b))
        ):
            self._factors = a.detach().clone(), b.detach().clone()
            self._norms = row_norms(self._site, *self._factors, scaling)
        return self._norms
