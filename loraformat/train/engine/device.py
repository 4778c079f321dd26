"""Frozen weights on a GPU: NF4 codes are copied there, and dequantized where they are multiplied.

A sixth to a quarter of the bytes of a dense weight crosses the bus. As many layers as fit are
resident: their codes are on the device for good. Those of any other layer are copied with each use.

Nothing here has been run on a GPU yet; its parts that do not depend on one are tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from loraformat.nf4 import codec
from loraformat.tensors.torch_arrays import tensor_of
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import DenseMatrix, Matrix, NF4Matrix, Range, Tile
from loraformat.train.engine.stored_weights import StoredWeights

__all__ = ["DeviceMatrix", "decode", "place_on"]

#: Elements that are decoded at once on a device: 64 MB of bfloat16.
_TILE = 1 << 25

#: Default share of the free device memory that the base may take.
_SHARE = 0.6


#: What a range of blocks is decoded from, by the names of `loraformat.nf4.codec.NF4`.
_Codes = dict[str, torch.Tensor]


class DeviceMatrix(Matrix):
    """A matrix whose blocks are on a device; resident, its codes or numbers stay there."""

    def __init__(
        self, host: NF4Matrix | DenseMatrix, device: torch.device, *, resident: bool
    ) -> None:
        super().__init__((host.rows, host.columns), in_out_layout=host.in_out_layout, device=device)
        self.host = host
        self._values: torch.Tensor | None = None
        self._codes: _Codes | None = None
        if resident and isinstance(host, DenseMatrix):
            self._values = host.values.to(device)
        elif resident and isinstance(host, NF4Matrix):
            self._codes = _cut(_held(host), host.codes.block_size, *_origin(host), device)

    def row_chunks(self) -> Iterator[Range]:
        """Yield as many rows as are decoded at once."""
        step = max(1, _TILE // max(self.columns, 1))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return a part of it; whole rows are decoded for it."""
        return self._rows(*rows, dtype)[:, slice(*columns)]

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield all rows, some at a time, in order."""
        for start, stop in self.row_chunks():
            yield start, stop, self._rows(start, stop, dtype)

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(self.host, DenseMatrix):
            values = self.host.values if self._values is None else self._values
            return values[start:stop].to(self.device).to(dtype)
        host = self.host
        first, last = (host.offset + row * self.columns for row in (start, stop))
        size, (begin, end) = host.codes.block_size, _groups(host, first, last)
        if self._codes is None:
            codes = _cut(_held(host), size, begin, end, self.device)
        else:
            origin = _origin(host)[0]
            codes = _cut(self._codes, size, begin - origin, end - origin, self.device)
        values = decode(
            codes["packed"], codes["absmax"], codes.get("nested_absmax"),
            host.codes.nested_offset, size, dtype,
        )  # fmt: skip
        return values[first - begin : last - begin].view(stop - start, self.columns)


def _held(host: NF4Matrix) -> _Codes:
    parts = {name: getattr(host.codes, name) for name in ("packed", "absmax", "nested_absmax")}
    return {name: tensor_of(part) for name, part in parts.items() if part is not None}


def _groups(host: NF4Matrix, first: int, last: int) -> tuple[int, int]:
    """Return the elements of whole groups of nested scales that cover a range."""
    group = host.codes.block_size * codec.NESTED_BLOCK_SIZE
    return first // group * group, min(-(-last // group) * group, host.codes.count)


def _origin(host: NF4Matrix) -> tuple[int, int]:
    """Return the range of groups that contains this matrix."""
    return _groups(host, host.offset, host.offset + host.rows * host.columns)


def _cut(codes: _Codes, size: int, first: int, last: int, device: torch.device) -> _Codes:
    """Return on a device what elements are decoded from, in blocks of a size."""
    one = {"packed": 2, "absmax": size, "nested_absmax": size * codec.NESTED_BLOCK_SIZE}
    return {
        name: part[first // one[name] : -(-last // one[name])].to(device)
        for name, part in codes.items()
    }


def decode(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: float | None,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize with torch alone on the device of the codes: the bits of `loraformat.nf4.codec`.

    Parameters
    ----------
    packed : torch.Tensor
        uint8: two codes in each, the first in the high nibble; from the beginning of a block.
    absmax : torch.Tensor
        uint8 scale codes, or float32 scales, of these blocks.
    nested_absmax, nested_offset : torch.Tensor and float, or None
        float32, one for each 256 scales, from the beginning of a group.
    block_size : int
    dtype : torch.dtype
        Each value, two for each byte, is rounded once to it, to nearest even.

    Examples
    --------
    >>> import numpy
    >>> q = codec.quantize(numpy.array([0.5, -2.0, 1.0], numpy.float32), double_quant=False)
    >>> decode(tensor_of(q.packed), tensor_of(q.absmax), None, None, 64, torch.float32).tolist()[:2]
    [0.4922246038913727, -2.0]
    """
    device = packed.device
    scales = absmax
    if nested_absmax is not None and nested_offset is not None:
        scales = tensor_of(codec.nested_map()).to(device)[absmax.long()]
        scales = scales * nested_absmax.repeat_interleave(codec.NESTED_BLOCK_SIZE)[: len(scales)]
        scales = scales + nested_offset
    levels = tensor_of(codec.levels()).to(device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    values = pairs[packed.long()].view(-1)
    values *= scales.repeat_interleave(block_size)[: len(values)]
    return values.to(dtype)


def place_on(
    model: Any,
    used: Mapping[str, Sequence[str]],
    weights: StoredWeights,
    device: torch.device,
    budget: int | None,
) -> set[str]:
    """Let a model compute on a device; returns the modules whose weights stay there for good.

    The model has its weights bound: `used` are the tensors that its modules read. Its embedding
    stays where it is, only its rows are copied. `budget` is how many bytes the base may take on the
    device; None for a share of what is free.
    """
    left = int(torch.cuda.mem_get_info(device)[0] * _SHARE) if budget is None else budget
    model.to(device)
    resident = set()
    for name, module in model.named_modules():
        if not isinstance(module, FrozenLinear | ExpertStack):
            continue
        size = sum(end - begin for one in used[name] for _, begin, end in weights.spans(one))
        stays = size <= left
        if stays:
            resident.add(name)
            left -= size
        module.device = device
        if isinstance(module, FrozenLinear):
            module.matrix = _placed(module.matrix, device, stays)
        else:
            module.experts = [
                [_placed(m, device, stays) for m in parts] for parts in module.experts
            ]
    return resident


def _placed(matrix: Matrix, device: torch.device, resident: bool) -> Matrix:
    assert isinstance(matrix, NF4Matrix | DenseMatrix)
    return DeviceMatrix(matrix, device, resident=resident)
