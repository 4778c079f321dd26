"""float8 checkpoints: 8-bit floating-point weights with scales.

Published by DeepSeek, Qwen, Meta, Mistral and others, and made by compressed-tensors, FBGEMM and
transformers. Beside a weight ``W`` of type E4M3 or E5M2 stands ``W_scale_inv`` (DeepSeek's name)
or ``W_scale``, one number for the tensor, for each output feature, or for each block; either is
multiplied: W = scale · code. DeepSeek-V4 calls it ``scale`` and Mistral ``qscale_weight``, beside
``weight``. It may be a power of two of type E8M0 (UE8M0), stored as such or as bytes; so are those
of MXFP8, one for 32 values of a row (OCP Microscaling Formats 1.0). Scales of activations belong to
float8 arithmetic and stay behind.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.bundle.reader import is_bundle
from loraformat.errors import InputError, UnsupportedError, UsageError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, tensor_view
from loraformat.model.packed_weights import FLOAT8, packed_weights
from loraformat.model.tensor_values import tensor_bytes
from loraformat.plugins import Converter, ReadOptions
from loraformat.shards.read_directory import open_model, stored_entries
from loraformat.tensors.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["CONVERTER", "read", "sniff"]

_CODES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
#: In the place of ``weight``.
_SCALES_BESIDE = ("scale", "qscale_weight")
_ACTIVATIONS = re.compile(
    r"\.((input|output|activation|k|v|q|kv)_scale(_ub)?|qscale_act)$|_proj_input_scale$"
)
_USUAL_BLOCK = (128, 128)
_MX_BLOCK = (1, 32)
#: Types of scales: numbers, and exponents of two.
_NUMBERS, _EXPONENTS = ("F32", "BF16", "F16"), ("F8_E8M0", "U8")
_TILE_ELEMENTS = 1 << 20


def sniff(path: Path) -> bool:
    """Tell whether the tensors of a model are codes of float8."""
    if is_bundle(path):
        return False
    found = packed_weights(stored_entries(path))
    return found is not None and found.method == FLOAT8


def read(path: Path, options: ReadOptions | None = None) -> Checkpoint:
    """Open a float8 checkpoint: its weights are decoded when they are loaded.

    Parameters
    ----------
    path : Path
    options : ReadOptions, optional
        ``dtype`` is that of the decoded weights, BF16 by default; rounded once, to nearest even.

    Raises
    ------
    InputError
        If a scale does not fit its weight.
    UnsupportedError
        If other weights are quantized by another method.
    """
    if options is not None and options.config is not None:
        raise UsageError(f"--config is for GGUF files, and {path} is {FLOAT8}")
    stored = open_model(path, FLOAT8)
    try:
        dtype = (options.dtype if options is not None else None) or "BF16"
        tensors, dropped = _decoded(stored, dtype)
        if other := packed_weights(tensors):
            raise UnsupportedError(
                f"is quantized with {other.method} beside float8 ({printable(other.tensor)})",
                path=path,
                hint="start from the original, unquantized model; the model's page on the Hub "
                "lists it as base model",
            )
    except BaseException:
        stored.close()
        raise
    left = [*stored.left_behind]
    if dropped:
        left.append(f"{dropped} scales of activations (they are for float8 arithmetic)")
    return replace(stored, tensors=tensors, quantization_config=None, left_behind=tuple(left))


def _decoded(stored: Checkpoint, dtype: str) -> tuple[dict[str, LazyTensor], int]:
    """Return the weights without their scales, and how many scales of activations there were."""
    block = _block_size(stored)
    codes = [name for name, tensor in stored.tensors.items() if tensor.dtype in _CODES]
    scales = {
        scale: name for name in codes for scale in _scale_names(name) if scale in stored.tensors
    }
    if len(scales) > len(set(scales.values())):
        raise InputError("a weight in it has two scales", path=stored.path)
    _refuse_unknown_scales(stored, set(codes) - set(scales.values()))
    by_weight = {
        weight: found for scale, weight in scales.items()
        if isinstance(found := stored.tensors[scale], DenseTensor)
    }  # fmt: skip
    tensors: dict[str, LazyTensor] = {}
    dropped = 0
    for name, tensor in stored.tensors.items():
        if name in scales:
            continue
        if _ACTIVATIONS.search(name):
            dropped += 1
        elif tensor.dtype in _CODES and isinstance(tensor, DenseTensor):
            tensors[name] = _weight(stored, tensor, by_weight.get(name), block, dtype)
        else:
            tensors[name] = tensor
    return tensors, dropped


def _scale_names(weight: str) -> list[str]:
    """Return the names that the scale of a weight may have."""
    beside = weight.removesuffix("weight")
    others = [beside + name for name in _SCALES_BESIDE] if beside != weight else []
    return [*(weight + suffix for suffix in _SCALES), *others]


def _refuse_unknown_scales(stored: Checkpoint, bare: set[str]) -> None:
    """Refuse codes without a scale that is known, but with one by another name beside them."""
    owners = {name.removesuffix("weight").rstrip(".") for name in bare}
    for name in stored.tensors:
        if "scale" not in name.rpartition(".")[2] or _ACTIVATIONS.search(name):
            continue
        if name.rpartition(".")[0] in owners or any(
            name[:at] in bare for at, sign in enumerate(name) if sign == "_"
        ):
            raise UnsupportedError(
                f"tensor {printable(name)} scales float8 weights in a way that is not supported",
                path=stored.path,
                hint="start from the original, unquantized model, or export bfloat16 with the "
                "program that wrote it",
            )


def _block_size(stored: Checkpoint) -> tuple[int, int]:
    """Return rows and columns of a block, by the config, or DeepSeek's."""
    value = (stored.quantization_config or {}).get("weight_block_size") or _USUAL_BLOCK
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(size) is int and 0 < size <= 1 << 20 for size in value)
    ):
        raise InputError(
            f"weight_block_size is {printable(value)}, wanted two sizes", path=stored.path
        )
    return value[0], value[1]


def _weight(
    stored: Checkpoint,
    codes: DenseTensor,
    scale: DenseTensor | None,
    block: tuple[int, int],
    dtype: str,
) -> DenseTensor:
    repeats = () if scale is None else _repeats(codes, scale, block, stored.path)
    nbytes = codes.nbytes + (0 if scale is None else scale.nbytes)

    def release() -> None:
        codes.release()
        if scale is not None:
            scale.release()

    return DenseTensor(
        codes.name,
        dtype,
        codes.shape,
        partial(_decode, codes, scale, repeats, dtype),
        release,
        (f"float8 {codes.dtype.removeprefix('F8_')}", nbytes),
    )


def _repeats(
    codes: DenseTensor, scale: DenseTensor, block: tuple[int, int], path: Path
) -> tuple[int, ...]:
    """Return how many elements share a scale, along each dimension of the weight.

    Raises
    ------
    InputError
        If the shapes fit in no way.
    """
    shape, own = codes.shape, _aligned(scale.shape, codes.shape)
    found = None
    if scale.dtype in _NUMBERS + _EXPONENTS and len(own) == len(shape):
        found = _repeats_in(shape, own, block)
        if found is None and scale.dtype in _EXPONENTS:
            found = _repeats_in(shape, own, _MX_BLOCK)
    if found is None:
        raise InputError(
            f"tensor {printable(scale.name)} is {scale.dtype} {list(scale.shape)}, which scales no "
            f"weight of shape {list(shape)} in blocks of {block[0]} x {block[1]}",
            path=path,
            hint="download the checkpoint again, with the config.json that belongs to it",
        )
    return found


def _repeats_in(
    shape: tuple[int, ...], own: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, ...] | None:
    """Return the same for blocks of this size; None if the scales are not as many."""
    repeats = []
    for count, scales, size in zip(
        shape, own, ((1,) * (len(shape) - 2) + block)[-len(shape) :], strict=False
    ):
        if scales in (1, count):
            repeats.append(1)
        elif scales == -(-count // size):
            repeats.append(size)
        else:
            return None
    return tuple(repeats)


def _aligned(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a scale's shape with as many dimensions as the weight's."""
    if scale in ((), (1,)):
        return (1,) * len(shape)
    if len(scale) == 1 and len(shape) == 2:  # one for each output feature
        return (*scale, 1)
    return scale


def _decode(
    codes: DenseTensor, scale: DenseTensor | None, repeats: tuple[int, ...], dtype: str
) -> memoryview:
    """Return scale · code, computed in float32 by tiles of rows and rounded once, as bytes."""
    import torch

    values = codes.torch()
    result = torch.empty(codes.shape, dtype=torch_dtype(dtype))
    if scale is None or not codes.shape:
        factor = 1.0 if scale is None else _numbers(scale)
        result.copy_(values.float() * factor)
    else:
        factors = _numbers(scale).reshape(_aligned(scale.shape, codes.shape))
        rows = codes.shape[0]
        height = max(1, _TILE_ELEMENTS * rows // max(codes.count, 1))
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            tile = values[start:stop].float()
            result[start:stop] = tile.mul_(_spread(factors, start, stop, codes.shape, repeats))
    return tensor_bytes(result)


def _numbers(scale: DenseTensor) -> torch.Tensor:
    """Return scales in float32: of a byte e, 2 to the power of e - 127, and NaN of 255."""
    import torch

    if scale.dtype in _NUMBERS:
        return scale.torch().float()
    exponents = tensor_view(scale.load(), "U8", scale.shape).int()
    bits = (exponents << 23).where(exponents > 0, 1 << 22)  # the least is half the least normal
    return bits.view(torch.float32).where(exponents < 255, torch.nan)


def _spread(
    factors: torch.Tensor, start: int, stop: int, shape: tuple[int, ...], repeats: tuple[int, ...]
) -> torch.Tensor:
    """Return the scales of some rows, one for each element or of size 1 where all share it."""
    import torch

    for dimension, (count, repeat) in enumerate(zip(shape, repeats, strict=True)):
        if factors.shape[dimension] > 1:
            first, last = (start, stop) if dimension == 0 else (0, count)
            factors = factors.index_select(dimension, torch.arange(first, last) // repeat)
    return factors


CONVERTER = Converter(
    name="float8",
    kind="base",
    summary="float8 checkpoint: E4M3 or E5M2 with scales by tensor, row or block",
    sniff=sniff,
    read=read,
    read_with=read,
)
