"""The layouts in which other programs store a stack of experts in NF4, and a bundle's own.

All are made by copying codes (`loraformat.nf4.runs`) where no matrix ends inside a block, and of
all decoding gives the same bits; where one does, its numbers are quantized again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Literal

import numpy

from loraformat.model.architecture import is_expert_stack
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4Parts
from loraformat.model.rows import RowReader
from loraformat.nf4.quantized import NF4
from loraformat.nf4.runs import kept, run_of
from loraformat.nf4.segments import rows_of_segments, stacked
from loraformat.ops.encoding.encode import QuantizationPolicy, dequantized, nf4_parts, quantized
from loraformat.ops.encoding.expert_stacks import in_transformers
from loraformat.tensors.arrays import Array, array_bytes, numpy_dtype

__all__ = [
    "fits_experts4bit", "in_segments", "layout_notes", "one_run", "with_scales",
    "with_single_experts",
]  # fmt: skip


def in_segments(tensor: NF4Tensor) -> NF4Tensor:
    """Return a stack whose codes run over all its experts with a segment for each.

    That is what bitsandbytes' `replace_parameter_4bit` makes. A stack whose matrices end inside a
    block stays as it is, and so does any other weight.
    """
    if tensor.segments or tensor.transposed or not _is_stack(tensor):
        return tensor
    number = prod(tensor.shape[:-2])
    return _cut(tensor, tensor.name, tensor.shape, number) or tensor


def one_run(tensor: NF4Tensor, policy: QuantizationPolicy) -> NF4Tensor:
    """Return a weight in segments as one run of blocks, as bitsandbytes quantizes a parameter.

    Its scales are float32: segments have an offset each, and such a weight has one.
    """
    copied = _cut(tensor, tensor.name, tensor.shape, None)
    return copied or quantized(dequantized(tensor), replace(policy, one_run=True), None)


def with_scales(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return a model's stacks in segments as `Experts4bit` of bitsandbytes#1965 stores them.

    A module has codes (experts, bytes) under the names of its parameters ``gate_up_proj`` and
    ``down_proj``, and float32 scales, ``gate_up_absmax`` and ``down_absmax``. Stacks of other
    modules, of (experts, in, out), and with rows that are not whole blocks become dense.
    """
    made: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, NF4Tensor) or tensor.segments is None:
            made[name] = tensor
        elif fits_experts4bit(tensor, tensors, tensor.block_size):
            made |= {one.name: one for one in _codes_and_scales(tensor)}
        else:
            made[name] = dequantized(tensor)
    return made


def with_single_experts(
    checkpoint: Checkpoint, policy: QuantizationPolicy, selects: Callable[[DenseTensor], bool]
) -> Checkpoint:
    """Return a model whose stacks of experts are a matrix for each expert and projection.

    Their names are those that transformers' class reads; stacks of a class that has none stay, and
    so do dense ones that will not be quantized, of which `selects` tells.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        stays = isinstance(tensor, DenseTensor) and not selects(tensor)
        pieces = [] if stays else _pieces_of(checkpoint, tensor)
        if not pieces:
            tensors[name] = tensor
        elif isinstance(tensor, NF4Tensor):
            tensors |= {one.name: one for one in _nf4_matrices(tensor, pieces, policy)}
        else:
            tensors |= {one.name: one for one in _matrices(tensor, pieces)}
    return replace(checkpoint, tensors=tensors)


def layout_notes(checkpoint: Checkpoint, layout: str | None) -> list[str]:
    """Say of which stacks in NF4 a layout does not keep the codes, or the scales, as stored."""
    again, decoded = [], []
    for tensor in checkpoint.nf4_weights:
        pieces = 0
        if layout == "each":
            pieces = sum(map(len, _pieces_of(checkpoint, tensor)))
        elif layout == "fused" and tensor.segments is not None:
            pieces = 1
        how = {_how(tensor, *ends) for ends in _ranges(tensor.count, pieces)} if pieces else set()
        if None in how:
            again.append(tensor.name)
        elif tensor.double_quant and "codes" in how:
            decoded.append(tensor.name)
    notes = []
    if again:
        notes.append(
            f"{len(again)} stacks of experts ({again[0]}, ...) are quantized again: their matrices "
            "are not whole blocks, so that codes cannot be kept in this layout"
        )
    if decoded:
        notes.append(
            f"{len(decoded)} stacks of experts ({decoded[0]}, ...) keep their codes, and their "
            "scales are written in float32, with the values that they had"
        )
    return notes


def _is_stack(tensor: LazyTensor) -> bool:
    return len(tensor.shape) == 3 and is_expert_stack(tensor.name)


def _pieces_of(checkpoint: Checkpoint, tensor: LazyTensor) -> list[list[str]]:
    """Return the names of a stack's matrices, expert by expert; none of what is no such stack."""
    if not _is_stack(tensor):
        return []
    memory = in_transformers(checkpoint, "write them in another layout: --experts fused")
    found = memory.find(tensor.name) if memory is not None else None
    if memory is None or found is None or memory.shapes[found] != tensor.shape:
        return []
    names = memory.expert_names(found)
    return names if names and tensor.shape[1] % len(names[0]) == 0 else []


def _ranges(count: int, pieces: int) -> Iterable[tuple[int, int]]:
    return pairwise(range(0, count + 1, count // pieces))


def _how(tensor: NF4Tensor, start: int, stop: int) -> Literal["all", "codes"] | None:
    return kept(tensor.segment_count, tensor.block_size, start, stop)


@dataclass(slots=True)
class _Shared:
    """A stack in NF4 that is loaded once for all that is made of it."""

    tensor: NF4Tensor
    users: int = 1
    codes: list[NF4] = field(default_factory=list)

    def load(self) -> list[NF4]:
        self.codes = self.codes or self.tensor.segment_codes(self.tensor.load())
        return self.codes

    def reader(self) -> RowReader:
        columns = self.tensor.shape[-1]
        return rows_of_segments(self.load(), columns, numpy_dtype(self.tensor.dtype))

    def release(self) -> None:
        """Forget the codes when as many have said so as use them."""
        self.users -= 1
        if self.users <= 0:
            self.codes = []
            self.tensor.release()


def _cut(
    tensor: NF4Tensor, name: str, shape: tuple[int, ...], number: int | None
) -> NF4Tensor | None:
    """Return a whole weight in another number of segments; None if its codes cannot be kept."""
    ranges = list(_ranges(tensor.count, number or 1))
    how = {_how(tensor, start, stop) for start, stop in ranges}
    if None in how:
        return None
    shared = _Shared(tensor)
    size = tensor.block_size, tensor.double_quant and how == {"all"}

    def load() -> NF4Parts:
        codes = shared.load()
        runs = (run_of(codes, start, stop) for start, stop in ranges)
        return nf4_parts(stacked(runs, len(ranges)), shape, tensor.dtype, number)

    return NF4Tensor(name, tensor.dtype, shape, *size, False, load, shared.release, number)


def _nf4_matrices(
    tensor: NF4Tensor, names: Sequence[Sequence[str]], policy: QuantizationPolicy
) -> Iterator[NF4Tensor]:
    flat = [name for expert in names for name in expert]
    shared, columns = _Shared(tensor, len(flat)), tensor.shape[-1]
    again = replace(policy, block_size=tensor.block_size, double_quant=tensor.double_quant)
    for name, (start, stop) in zip(flat, _ranges(tensor.count, len(flat)), strict=True):
        shape = (stop - start) // columns, columns
        how = _how(tensor, start, stop)
        if how is None:
            rows = partial(_rows_from, shared.reader, start // columns)
            piece = DenseTensor.by_rows(name, tensor.dtype, shape, rows, shared.release)
            yield quantized(piece, again, None)
            continue
        yield NF4Tensor(
            name, tensor.dtype, shape, tensor.block_size, tensor.double_quant and how == "all",
            False, partial(_run, shared, start, stop, shape), shared.release,
        )  # fmt: skip


def _run(shared: _Shared, start: int, stop: int, shape: tuple[int, ...]) -> NF4Parts:
    codes = run_of(shared.load(), start, stop)
    return nf4_parts(stacked([codes], 1), shape, shared.tensor.dtype, None)


def _matrices(tensor: DenseTensor, names: Sequence[Sequence[str]]) -> Iterator[DenseTensor]:
    flat = [name for expert in names for name in expert]
    rows = tensor.matrix_shape[0] // len(flat)
    for number, name in enumerate(flat):
        open_rows = partial(_rows_from, tensor.row_reader, number * rows)
        shape = rows, tensor.shape[-1]
        yield DenseTensor.by_rows(name, tensor.dtype, shape, open_rows, tensor.release)


def _rows_from(open_reader: Callable[[], RowReader], first: int) -> RowReader:
    read = open_reader()
    return lambda start, stop: read(first + start, first + stop)


def fits_experts4bit(
    tensor: LazyTensor, tensors: Mapping[str, LazyTensor], block_size: int
) -> bool:
    """Tell whether a stack is one that `with_scales` takes, by its shape and its neighbour's."""
    module, _, leaf = tensor.name.rpartition(".")
    gate_up, down = (tensors.get(f"{module}.{one}") for one in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or leaf not in ("gate_up_proj", "down_proj"):
        return False
    if not _is_stack(gate_up) or not _is_stack(down):
        return False
    (_, both, hidden), (_, out, intermediate) = gate_up.shape, down.shape
    blocks = hidden % block_size == 0 and intermediate % block_size == 0
    return blocks and (both, hidden) == (2 * intermediate, out)


def _codes_and_scales(tensor: NF4Tensor) -> list[DenseTensor]:
    experts, each = tensor.shape[0], prod(tensor.shape[1:])
    shared = _Shared(tensor, 2)

    def packed() -> memoryview:
        return array_bytes(_rows([one.packed for one in shared.load()]))

    def absmax() -> memoryview:
        return array_bytes(_rows([one.scales() for one in shared.load()]))

    scales = tensor.name.removesuffix("_proj") + "_absmax"
    sizes = (experts, each // 2), (experts, each // tensor.block_size)
    return [
        DenseTensor(tensor.name, "U8", sizes[0], packed, shared.release),
        DenseTensor(scales, "F32", sizes[1], absmax, shared.release),
    ]


def _rows(arrays: Sequence[Array]) -> Array:
    return numpy.concatenate([array.reshape(-1) for array in arrays])
