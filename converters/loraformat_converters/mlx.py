"""MLX checkpoints, as mlx-lm converts models: affine integers of 1 to 8 bits, MXFP4, NVFP4, MXFP8.

Format: github.com/ml-explore/mlx, 0.32 (2026), ``mlx.core.quantize``. ``weight`` U32 holds codes
along the input in dense words; ``scales`` and, in mode affine, ``biases`` have one number for a
group of a row: W = scale · code + bias. The config's ``quantization`` has bits, group size and mode
of all modules, and of single ones by their paths.

mlx-lm stores the experts of a layer as stacks, in ``switch_mlp``: here they get the names of the
original model again. It changes more in models with convolutions and others; only those of types
that are known to keep their names and numbers are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.families.table import model_type
from loraformat.model import config_json
from loraformat.model.block_numbers import SCALE_TYPES, default_dtype, scaled
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import FLOAT8_VALUES
from loraformat.model.packed_weights import MLX, ORIGINAL
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array, numpy_dtype
from loraformat.tensors.packed_codes import e2m1, unpack

__all__ = ["CONVERTER", "METHOD"]

#: Bits and group size where a module's settings name none, by mode.
_DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_AFFINE_BITS, _AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
#: The numbers of a byte, and the type of the scales, of modes of floats.
_FLOATS: dict[str, tuple[Callable[[Array], Array], str]] = {
    "mxfp4": (e2m1, "F8_E8M0"),
    "nvfp4": (e2m1, "F8_E4M3"),
    "mxfp8": (lambda codes: FLOAT8_VALUES["F8_E4M3"].take(codes), "F8_E8M0"),
}
_STACK = ".switch_mlp."
_MOST_EXPERTS = 4096
#: Families whose experts have other names than MLX's projections.
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT_NAMES: dict[str, dict[str, str]] = {
    "mixtral": _W, "phimoe": _W, "qwen2_moe": {}, "qwen3_moe": {}, "olmoe": {}, "glm4_moe": {},
    "deepseek_v2": {}, "deepseek_v3": {},
}  # fmt: skip
_KNOWN = {
    *_EXPERT_NAMES, "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama",
    "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
}  # fmt: skip
#: What newer versions make of DeepSeek's kv_b_proj.
_OWN_MODULES = (".embed_q.", ".unembed_out.")


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    named = model_type(config_json.parse(stored.config)) if stored.config else None
    wrong = next((name for name in stored.tensors if any(own in name for own in _OWN_MODULES)), "")
    if named not in _KNOWN or wrong:
        of = f" ({printable(wrong)})" if wrong else ""
        raise UnsupportedError(
            f"holds MLX weights of a model of type {printable(named)}{of}, which MLX stores in "
            "another form than transformers",
            path=stored.path,
            hint=ORIGINAL,
        )
    for name, codes in stored.tensors.items():
        owner = name.removesuffix(".weight")
        packed = codes.dtype == "U32" or f"{owner}.scales" in stored.tensors
        if owner == name or not (packed or _STACK in name):
            continue
        parts = [stored_part(stored, name, ("U32",)), *_numbers(stored, owner)]
        if _STACK not in name:
            yield _weight(stored, name, parts, _settings(stored, owner))
            continue
        new = _EXPERT_NAMES.get(named, {})
        before, _, projection = owner.partition(_STACK)
        count = _expert_count(stored, parts)
        for expert in range(count):
            renamed = f"{before}.experts.{expert}.{new.get(projection, projection)}.weight"
            own = [_of_expert(part, expert) for part in parts]
            yield _weight(stored, renamed, own, _settings(stored, owner))


def _numbers(stored: Checkpoint, owner: str) -> Iterator[DenseTensor]:
    """Yield the scales of a module, and its biases if its mode has some."""
    affine = _settings(stored, owner)[0] == "affine"
    yield stored_part(stored, f"{owner}.scales", SCALE_TYPES if affine else ("U8",))
    if affine:
        yield stored_part(stored, f"{owner}.biases", SCALE_TYPES)


def _settings(stored: Checkpoint, owner: str) -> tuple[str, int, int]:
    """Return mode, bits and group size of a module."""
    common = stored.quantization_config or {}
    own: Any = common.get(owner)
    settings = own if isinstance(own, dict) else common
    mode = settings.get("mode", "affine")
    bits, size = _DEFAULTS.get(mode, (0, 0)) if isinstance(mode, str) else (0, 0)
    found = settings.get("bits", bits), settings.get("group_size", size)
    known = found == (bits, size) if mode != "affine" else (
        type(found[0]) is int and found[0] in _AFFINE_BITS and found[1] in _AFFINE_GROUPS
    )  # fmt: skip
    if not known or not settings:
        raise UnsupportedError(
            f"module {printable(owner)} has {printable(found[0])} bits, groups of "
            f"{printable(found[1])} and mode {printable(mode)} in the config, wanted "
            f"{', '.join(map(str, _AFFINE_BITS))} bits and groups of 32, 64 or 128 in mode affine, "
            "or mode mxfp4, nvfp4 or mxfp8 with its own numbers",
            path=stored.path,
            hint=DAMAGED,
        )
    return mode, int(found[0]), int(found[1])


def _expert_count(stored: Checkpoint, parts: list[DenseTensor]) -> int:
    counts = {part.shape[0] if len(part.shape) == 3 and part.count else 0 for part in parts}
    if len(counts) > 1 or not 0 < max(counts) <= _MOST_EXPERTS:
        raise _misfit(stored, parts, "the same number of experts first")
    return max(counts)


def _of_expert(part: DenseTensor, expert: int) -> DenseTensor:
    """Return one expert's part of a stack."""
    size = part.nbytes // part.shape[0]

    def load() -> memoryview:
        return part.load()[expert * size : (expert + 1) * size]

    return DenseTensor(part.name, part.dtype, part.shape[1:], load, part.release)


def _weight(
    stored: Checkpoint, name: str, parts: list[DenseTensor], settings: tuple[str, int, int]
) -> QuantizedWeight:
    mode, bits, size = settings
    codes, scale, *bias = parts
    columns = codes.shape[-1] * 32 // bits if len(codes.shape) == 2 else 0
    groups = columns // size
    shape = (*codes.shape[:-1], columns)
    if (
        not groups
        or columns % size
        or codes.shape[-1] * 32 % bits
        or any(part.shape != (*codes.shape[:-1], groups) for part in parts[1:])
    ):
        raise _misfit(
            stored, parts, f"(out, in * {bits} / 32) and (out, in / {size}) of equally many groups"
        )

    def affine(start: int, stop: int) -> Array:
        found = unpack(codes.rows(start, stop), bits, 0, columns)
        grouped = found.reshape(stop - start, groups, size)
        grouped *= scale.rows(start, stop).astype(numpy.float32)[..., None]
        grouped += bias[0].rows(start, stop).astype(numpy.float32)[..., None]
        return found

    if mode == "affine":
        return QuantizedWeight(
            name, shape, tuple(parts), f"MLX int{bits}", affine, default_dtype(scale)
        )
    numbers, scale_type = _FLOATS[mode]
    rows = scaled(
        lambda start, stop: numbers(codes.rows(start, stop).view(numpy.uint8)),
        lambda start, stop: (
            scale.rows(start, stop).view(numpy_dtype(scale_type)).astype(numpy.float32)
        ),
    )
    return QuantizedWeight(name, shape, tuple(parts), f"MLX {mode}", rows)


def _misfit(stored: Checkpoint, parts: list[DenseTensor], wanted: str) -> InputError:
    shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
    return InputError(
        f"tensor {printable(parts[0].name)} and its scales are {shapes}, wanted {wanted}",
        path=stored.path,
        hint=DAMAGED,
    )


METHOD = QuantizationMethod(MLX, _weights)
CONVERTER = quantized_format(METHOD, "MLX checkpoint: 1 to 8 bits by group, MXFP4, NVFP4, MXFP8")
