"""Experts that a checkpoint stores one by one, as the stacks that transformers makes of them.

A bundle names weights as the model's state dict does, and transformers 5 keeps the experts of a
layer in one parameter for each projection. Which tensors belong to which rows follows from their
names in the families that the table of families has; of others transformers' own conversion mapping
says it. Experts in NF4 become segments, which keep their codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate

import numpy

from loraformat.errors import InputError, MissingDependencyError, printable
from loraformat.families.expert_names import fused_experts
from loraformat.families.table import family_of, model_type
from loraformat.model.architecture import is_expert_stack
from loraformat.model.base_names.in_memory import InMemory
from loraformat.model.base_names.resolver import names_of
from loraformat.model.base_names.sources import MISSING
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4Parts
from loraformat.model.rows import RowReader
from loraformat.model.tied_head import config_of
from loraformat.nf4.segments import stacked
from loraformat.ops.encoding.encode import nf4_parts
from loraformat.tensors.arrays import Array

__all__ = ["in_transformers", "with_expert_stacks"]

_ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.")
#: What configs call the number of experts.
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def with_expert_stacks(
    checkpoint: Checkpoint, selects: Callable[[DenseTensor], bool]
) -> Checkpoint:
    """Return a model whose experts are stacks (experts, out, in), read when they are loaded.

    A model without such experts, or of a class that transformers does not know, stays as it is.
    Experts in NF4 become the segments of a stack; those that are not alike stay apart.

    Parameters
    ----------
    checkpoint : Checkpoint
    selects : callable
        Tells of a dense stack whether it will be quantized; the experts of others stay apart.

    Raises
    ------
    InputError
        If experts are missing, or of another size than the config says.
    MissingDependencyError
        If only transformers knows, and it is not installed.
    """
    if not any(_will_be_stacked(tensor, selects) for tensor in checkpoint.tensors.values()):
        return checkpoint
    made: dict[str, LazyTensor] = {}
    replaced: set[str] = set()
    for target, (names, shape) in (_by_name(checkpoint) or _by_mapping(checkpoint)).items():
        stack = _stack(target, [checkpoint.tensors[name] for name in names], shape)
        if isinstance(stack, NF4Tensor) or (stack is not None and selects(stack)):
            made[names[0]] = stack
            replaced.update(names)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in made:
            tensors[made[name].name] = made[name]
        elif name not in replaced:
            tensors[name] = tensor
    return replace(checkpoint, tensors=tensors)


def _will_be_stacked(tensor: LazyTensor, selects: Callable[[DenseTensor], bool]) -> bool:
    match = _ONE_EXPERT.match(tensor.name)
    if match is None or isinstance(tensor, NF4Tensor):
        return match is not None
    return selects(replace(tensor, name=f"{match[1]}.gate_up_proj", shape=(1, *tensor.shape)))


#: Of each parameter the tensors that make it, in the order of its rows, and its shape.
_Stacks = dict[str, tuple[list[str], tuple[int, ...]]]


def _by_name(checkpoint: Checkpoint) -> _Stacks | None:
    """Find stacks in a family of known names; None if it is another, or anything is irregular."""
    config = config_of(checkpoint)
    family = family_of(config)
    found = fused_experts(checkpoint.tensors) if family.expert_leaves else None
    if found is None:
        return None
    configs = (config, config.get("text_config") or {})
    said = {one[key] for one in configs for key in _NUMBERS if type(one.get(key)) is int}
    stacks: _Stacks = {}
    for target, experts in found.items():
        names = [name for parts in experts for name in parts]
        shapes = {checkpoint.tensors[name].shape for name in names}
        shape = shapes.pop()
        if shapes or len(shape) != 2 or (said and len(experts) not in said):
            return None
        stacks[target] = names, (len(experts), len(experts[0]) * shape[0], shape[1])
    return stacks


def _by_mapping(checkpoint: Checkpoint) -> _Stacks:
    """Find the stacks that transformers makes of a checkpoint; none of a class it does not know."""
    memory = in_transformers(checkpoint, "leave them dense: --skip '*.experts.*'")
    if memory is None:
        return {}
    for target, how in memory.sources.computed.items():
        if is_expert_stack(target) and how == MISSING:
            raise _incomplete(checkpoint, target, how)
    stacks: _Stacks = {}
    for target, experts in memory.sources.stacked.items():
        names = [name for parts in experts for name in parts]
        if not all(map(_ONE_EXPERT.match, names)):
            continue
        parts, wanted = [checkpoint.tensors[name] for name in names], memory.shapes[target]
        found = len(experts), sum(part.matrix_shape[0] for part in parts), parts[0].shape[-1]
        if found != (wanted[0], wanted[0] * wanted[1], wanted[2]):
            rows = f"{found[0]} experts with {found[1]} rows of {found[2]} in all"
            said = f"the config says {wanted[0]} of {wanted[1]} x {wanted[2]} each"
            raise _incomplete(checkpoint, target, f"{rows}, {said}")
        stacks[target] = names, wanted
    return stacks


def in_transformers(checkpoint: Checkpoint, otherwise: str) -> InMemory | None:
    """Return a model as transformers has it in memory; None of a class that it does not know.

    Raises `MissingDependencyError` if it is not installed, with what else the user can do.
    """
    if model_type(config_of(checkpoint)) is not None and find_spec("transformers") is None:
        raise MissingDependencyError(
            "which experts belong to which parameter is asked of transformers, which is missing",
            hint=f"run: pip install 'loraformat[train]'; or {otherwise}",
        )
    return names_of(checkpoint).memory


def _incomplete(checkpoint: Checkpoint, target: str, problem: str) -> InputError:
    return InputError(
        f"parameter {printable(target)}: {problem}",
        path=checkpoint.path,
        hint="the checkpoint is incomplete or has another model's config.json: download it again",
    )


def _stack(target: str, parts: Sequence[LazyTensor], shape: tuple[int, ...]) -> LazyTensor | None:
    """Return matrices below each other as one tensor; None if they are not alike."""
    if all(isinstance(part, NF4Tensor) for part in parts):
        return _nf4_stack(target, [part for part in parts if isinstance(part, NF4Tensor)], shape)
    dense = [part for part in parts if isinstance(part, DenseTensor)]
    kinds = {(part.dtype, part.shape[1:]) for part in dense}
    if len(dense) != len(parts) or len(kinds) != 1:
        return None
    ends = list(accumulate(part.matrix_shape[0] for part in dense))

    def release() -> None:
        for part in dense:
            part.release()

    def open_rows() -> RowReader:
        return lambda start, stop: _rows(dense, ends, start, stop)

    return DenseTensor.by_rows(target, dense[0].dtype, shape, open_rows, release, _stored(dense))


def _nf4_stack(target: str, parts: Sequence[NF4Tensor], shape: tuple[int, ...]) -> NF4Tensor | None:
    first = parts[0]
    alike = {
        (part.dtype, part.shape, part.block_size, part.double_quant, part.stored_shape)
        for part in parts
    }
    if len(alike) != 1 or first.transposed or len(first.shape) != 2 or len(shape) != 3:
        return None
    if (len(parts) * first.shape[0], first.shape[1]) != (shape[0] * shape[1], shape[2]):
        return None
    number = len(parts)

    def load() -> NF4Parts:
        codes = (part.segment_codes(part.load())[0] for part in parts)
        return nf4_parts(stacked(codes, number), shape, first.dtype, number)

    def release() -> None:
        for part in parts:
            part.release()

    size = first.block_size, first.double_quant
    return NF4Tensor(target, first.dtype, shape, *size, False, load, release, number)


def _rows(parts: Sequence[DenseTensor], ends: Sequence[int], start: int, stop: int) -> Array:
    first = int(numpy.searchsorted(ends, start, side="right"))
    found = []
    while start < stop:
        origin = ends[first - 1] if first else 0
        last = min(stop, ends[first])
        found.append(parts[first].rows(start - origin, last - origin))
        start, first = last, first + 1
    return found[0] if len(found) == 1 else numpy.concatenate(found)


def _stored(parts: Sequence[DenseTensor]) -> tuple[str, int] | None:
    """Return what numbers that are decoded from codes say of their storage, if they do."""
    if not parts[0].quantization:
        return None
    return parts[0].stored_as, sum(part.stored_bytes for part in parts)
