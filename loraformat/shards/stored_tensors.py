"""Grouping of stored tensors into logical ones, such as NF4 weights.

A weight in NF4 lies in its shard as four or six tensors that share a name. `collect`
puts them together, checks that they fit each other (rules ``N01`` to ``N09``), and
returns lazy tensors. Bundles and bitsandbytes checkpoints are both read through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy

from loraformat.errors import FormatError, printable
from loraformat.model.checkpoint import DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4_PARTS, SEGMENT_PARTS, NF4Parts
from loraformat.nf4.quant_state import MAX_QUANT_STATE_BYTES, QuantState, parse_quant_state
from loraformat.nf4.tables import LEVEL_BYTES, NESTED_MAP_BYTES
from loraformat.tensors.mapped import MappedFile

__all__ = ["FP4_STATE_SUFFIX", "STATE_SUFFIX", "collect"]

STATE_SUFFIX = NF4_PARTS["quant_state"]
#: That of FP4, whose other parts have the names of NF4's; here they are tensors like any other.
FP4_STATE_SUFFIX = ".quant_state.bitsandbytes__fp4"

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def collect(
    files: Sequence[MappedFile],
    *,
    transposed: Callable[[str], bool] = lambda name: False,
    errors: Mapping[str, float | None] | None = None,
    any_storage: bool = False,
) -> dict[str, LazyTensor]:
    """Return the logical tensors of some shards, in the order of these and of their bytes.

    Parameters
    ----------
    transposed : callable
        Tells of an NF4 weight, by name, whether its codes run over the transpose.
    errors : mapping of str to float or None, optional
        Recorded quantization error of each NF4 weight.
    any_storage : bool
        Accept packed codes that are stored as another dtype (``bnb_4bit_quant_storage``):
        the bytes are the same, only their label differs.

    Raises
    ------
    FormatError
        H10 if two shards hold a tensor of one name, or an N rule.
    """
    tensors: dict[str, LazyTensor] = {}
    stored: set[str] = set()
    for file in files:
        if twice := stored.intersection(file.header.entries):
            raise FormatError(
                "H10", f"tensor {printable(min(twice))} is also in another shard", path=file.path
            )
        stored.update(file.header.entries)
        tensors |= _tensors_of(file, transposed, errors or {}, any_storage)
    return tensors


def _tensors_of(
    file: MappedFile,
    transposed: Callable[[str], bool],
    errors: Mapping[str, float | None],
    any_storage: bool,
) -> dict[str, LazyTensor]:
    entries = file.header.entries
    owners = {name.removesuffix(STATE_SUFFIX) for name in entries if name.endswith(STATE_SUFFIX)}
    tensors: dict[str, LazyTensor] = {}
    for name, entry in entries.items():
        owner = _owner(name, owners, file)
        if owner is not None and owner not in tensors:
            tensor, state = _nf4_tensor(file, owner, transposed(owner), errors.get(owner))
            _check_parts(file, tensor, state, any_storage)
            tensors[owner] = tensor
        if owner is None or not _is_part(name, tensors[owner]):
            load, release = partial(file.view, name), file.releaser(name)
            tensors[name] = DenseTensor(name, entry.dtype, entry.shape, load, release)
    return tensors


def _is_part(name: str, owner: LazyTensor) -> bool:
    """Tell whether a tensor named as a part is one: only weights with segments have offsets."""
    has_segments = isinstance(owner, NF4Tensor) and owner.segments is not None
    return has_segments or name != owner.name + SEGMENT_PARTS["nested_offset"]


def _owner(name: str, owners: set[str], file: MappedFile) -> str | None:
    """Return the NF4 weight that a stored tensor is a part of; refuse a part of none."""
    for suffix in SEGMENT_PARTS.values():
        owner = name.removesuffix(suffix)
        if name.endswith(suffix) and owner in owners:
            return owner
        of_fp4 = owner + FP4_STATE_SUFFIX in file.header.entries
        own = suffix in NF4_PARTS.values() and suffix and not of_fp4
        if own and name.endswith(".weight" + suffix):
            problem = "belongs to an NF4 weight whose quant state is missing"
            raise FormatError("N01", f"tensor {printable(name)} {problem}", path=file.path)
    return None


def _nf4_tensor(
    file: MappedFile, name: str, transposed: bool, error: float | None
) -> tuple[NF4Tensor, QuantState]:
    entries = file.header.entries
    state_name = name + STATE_SUFFIX
    state_entry = entries[state_name]
    if state_entry.dtype != "U8" or not 0 < state_entry.nbytes <= MAX_QUANT_STATE_BYTES:
        raise FormatError(
            "N05",
            f"tensor {printable(state_name)} is not 1 to {MAX_QUANT_STATE_BYTES} bytes of text",
            path=file.path,
        )
    state = parse_quant_state(bytes(file.view(state_name)), name, file.path)
    tensor = NF4Tensor(
        name=name,
        dtype=state.dtype,
        shape=state.shape[::-1] if transposed else state.shape,
        block_size=state.block_size,
        double_quant=state.double_quant,
        transposed=transposed,
        load=lambda: _load(file, tensor, state, error),
        release=file.releaser(*(n for s in SEGMENT_PARTS.values() if (n := name + s) in entries)),
        segments=state.segments,
    )
    return tensor, state


def _load(file: MappedFile, tensor: NF4Tensor, state: QuantState, error: float | None) -> NF4Parts:
    stored = {part: tensor.name + suffix for part, suffix in SEGMENT_PARTS.items()}
    views: dict[str, Any] = {
        part: file.view(name) if name in file.header.entries else None
        for part, name in stored.items()
    }
    views["quant_state"] = bytes(views["quant_state"])
    if state.segments is None:
        views["nested_offset"] = None  # of that name it would be a tensor of its own
    parts = NF4Parts(**views, relative_rms_error=error, segments=state.segments)
    _check_scales(file, tensor, state, parts)
    size = (state.count + 1) // 2
    if state.count % 2 and any(last & 0x0F != 7 for last in parts.packed[size - 1 :: size]):
        raise FormatError(
            "V05",
            f"tensor {printable(tensor.name)} does not end with the code 7 that pads it",
            path=file.path,
        )
    return parts


def _check_scales(file: MappedFile, tensor: NF4Tensor, state: QuantState, parts: NF4Parts) -> None:
    """V04: every scale, once decoded, is finite."""
    stored = parts.absmax if parts.nested_absmax is None else parts.nested_absmax
    offsets = parts.nested_offset or numpy.float32(state.nested_offset or 0.0).tobytes()
    # No entry of the map is beyond 1, so this sum bounds every decoded scale.
    largest = [float(numpy.abs(numpy.frombuffer(x, dtype="<f4")).max()) for x in (stored, offsets)]
    if sum(largest) <= _LARGEST_FLOAT32:
        return
    with numpy.errstate(all="ignore"):
        scales = [segment.scales() for segment in tensor.segment_codes(parts)]
        finite = numpy.isfinite(numpy.concatenate(scales))
    if not finite.all():
        name, block = printable(tensor.name), finite.argmin()
        problem = f"tensor {name} has a scale that is not finite, of block {block}"
        raise FormatError("V04", problem, path=file.path)


def _check_parts(file: MappedFile, tensor: NF4Tensor, state: QuantState, any_storage: bool) -> None:
    def broken(rule: str, suffix: str, problem: str) -> FormatError:
        return FormatError(
            rule, f"tensor {printable(tensor.name + suffix)} {problem}", path=file.path
        )

    entries = file.header.entries
    state_bytes = entries[tensor.name + STATE_SUFFIX].nbytes
    wanted = {part.suffix: part for part in tensor.parts(state_bytes)}
    parts = NF4_PARTS if tensor.segments is None else SEGMENT_PARTS
    for suffix in parts.values():
        if (suffix in wanted) != (tensor.name + suffix in entries):
            stray = "has no place without double quantization"
            raise broken("N01", suffix, "is missing" if suffix in wanted else stray)
    for suffix, part in wanted.items():
        entry = entries[tensor.name + suffix]
        if any_storage and suffix == "" and entry.nbytes == part.nbytes:
            continue
        if (entry.dtype, entry.shape) != (part.dtype, part.shape):
            raise broken(
                "N02" if suffix == "" else "N03",
                suffix,
                f"is {entry.dtype} {list(entry.shape)}, wanted {part.dtype} {list(part.shape)} "
                f"for a weight of shape {list(state.shape)}",
            )
    for part_name, table in (("quant_map", LEVEL_BYTES), ("nested_quant_map", NESTED_MAP_BYTES)):
        suffix = NF4_PARTS[part_name]
        if suffix in wanted and bytes(file.view(tensor.name + suffix)) != table:
            raise broken("N04", suffix, "is not the table of NF4, bit for bit")
