"""Encoding of values to ggml block types.

Q8_0 has ggml's own bits. The scales of Q4_0, Q4_1, Q5_0 and Q5_1 are searched for, see
`loraformat_converters.gguf.scale_search`: their errors are smaller than ggml's plain encoder's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat_converters.gguf.scale_search import offset_codes, signed_codes
from loraformat_converters.gguf.types import GGMLType

if TYPE_CHECKING:
    import torch

__all__ = ["store_blocks"]

#: What `signed_codes` tries, and `offset_codes`: chosen by the errors from normal numbers and
#: from NF4 that were measured with more and fewer of them.
_STRETCHES = {
    GGMLType.Q4_0: (1.0, 0.9, 0.94, 1.04, 1.08, 1.12),
    GGMLType.Q5_0: (1.0, 0.925, 0.9625, 1.0375, 1.075),
}
_SHARES = {GGMLType.Q4_1: (1.0, 0.93, 0.86), GGMLType.Q5_1: (1.0, 0.97, 0.94)}


def store_blocks(tile: torch.Tensor, stored: torch.Tensor, type: GGMLType) -> None:
    """Write the bytes of some rows.

    Parameters
    ----------
    tile : torch.Tensor
        float32, rows of whole blocks; finite, and within float16.
    stored : torch.Tensor
        uint8, to be filled row by row.
    type : GGMLType
        Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.
    """
    import torch

    if type is GGMLType.Q8_0:
        _q8_0(tile, stored)
        return
    blocks = tile.reshape(-1, type.block).T.contiguous()
    levels = 32 if type in (GGMLType.Q5_0, GGMLType.Q5_1) else 16
    if type in _STRETCHES:
        scales, codes = signed_codes(blocks, levels, _STRETCHES[type])
        numbers = [scales]
    else:
        scales, minima, codes = offset_codes(blocks, levels, _SHARES[type])
        numbers = [scales, minima]
    head = [number.view(torch.uint8).view(-1, 2) for number in numbers]
    out = stored.view(-1, type.block_bytes)
    torch.cat([*head, *(part.T for part in _packed(codes, levels))], dim=1, out=out)


def _packed(codes: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Return the bytes behind the scales: fifth bits, if there are any, then halves of bytes."""
    half = len(codes) // 2
    packed = [(codes[:half] & 15) | (codes[half:] << 4)]
    if levels == 32:
        fifth = (codes >> 4).view(4, 8, -1)
        packed.insert(0, sum((fifth[:, bit] << bit for bit in range(1, 8)), fifth[:, 0]))
    return packed


def _q8_0(tile: torch.Tensor, stored: torch.Tensor) -> None:
    """Store blocks of 32 as ggml does: d = max |x| / 127 in F16, then round(x / d) in int8.

    The quotient is x times the float32 1/d; halves round away from zero
    (``quantize_row_q8_0_ref``).
    """
    import torch

    blocks = tile.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    numbers = blocks * inverse
    whole = numbers.to(torch.int8)  # towards zero; what is left decides
    whole += numbers.sub_(whole).mul_(2).to(torch.int8)
    out = stored.view(-1, 34)
    out[:, :2] = scale.to(torch.float16).view(torch.uint8)
    out[:, 2:] = whole.view(torch.uint8)
