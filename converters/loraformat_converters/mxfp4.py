"""MXFP4 checkpoints of gpt-oss.

Format: OCP Microscaling Formats 1.0, blocks of 32 values E2M1 with one scale E8M0. A parameter
``P`` of shape (experts, in, out) lies on the disk as ``P_blocks``, U8 (experts, out, in / 32, 16),
two codes a byte, the first in the low nibble, and ``P_scales``, U8 (experts, out, in / 32):
value = level · 2^(scale − 127). bfloat16 holds every such value exactly.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from loraformat.bundle.reader import is_bundle
from loraformat.errors import InputError, UnsupportedError, UsageError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, tensor_view
from loraformat.model.packed_weights import MXFP4, packed_weights
from loraformat.model.tensor_values import tensor_bytes
from loraformat.plugins import Converter, ReadOptions
from loraformat.shards.read_directory import open_model, peek_config, stored_entries
from loraformat.tensors.dtypes import torch_dtype

__all__ = ["CONVERTER", "read", "sniff"]

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32
_BIAS = 127
#: E8M0 has no infinity: this is its NaN.
_NAN = 255
#: E2M1 by code, the sign in the highest bit (OCP MX 1.0, section 5.3.3).
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def sniff(path: Path) -> bool:
    """Tell whether the tensors of a model are blocks of MXFP4."""
    if is_bundle(path):
        return False
    found = packed_weights(stored_entries(path))
    return found is not None and found.method == MXFP4


def read(path: Path, options: ReadOptions | None = None) -> Checkpoint:
    """Open an MXFP4 checkpoint of gpt-oss: its experts are decoded when they are loaded.

    Parameters
    ----------
    path : Path
    options : ReadOptions, optional
        ``dtype`` is that of the decoded weights; BF16, the default, loses nothing.

    Raises
    ------
    InputError
        If blocks and scales do not fit each other.
    UnsupportedError
        If it is another model's: which way round its experts lie is not known.
    """
    if options is not None and options.config is not None:
        raise UsageError(f"--config is for GGUF files, and {path} is {MXFP4}")
    model_type = peek_config(path).get("model_type")
    if model_type != "gpt_oss":
        raise UnsupportedError(
            f"holds MXFP4 weights of a model of type {printable(model_type)}, and only those of "
            "gpt_oss can be read",
            path=path,
            hint="start from the original, unquantized model, if it was published",
        )
    stored = open_model(path, MXFP4)
    try:
        tensors = _decoded(stored, (options.dtype if options is not None else None) or "BF16")
        if other := packed_weights(tensors):
            raise UnsupportedError(
                f"is quantized with {other.method} beside MXFP4 ({printable(other.tensor)})",
                path=path,
            )
    except BaseException:
        stored.close()
        raise
    return replace(stored, tensors=tensors, quantization_config=None)


def _decoded(stored: Checkpoint, dtype: str) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.tensors.items():
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in stored.tensors:
            continue
        parameter = name.removesuffix(_BLOCKS)
        if parameter != name and isinstance(tensor, DenseTensor):
            scales = stored.tensors.get(parameter + _SCALES)
            tensors[parameter] = _parameter(parameter, tensor, scales, dtype, stored.path)
        else:
            tensors[name] = tensor
    return tensors


def _parameter(
    name: str, blocks: DenseTensor, scales: LazyTensor | None, dtype: str, path: Path
) -> DenseTensor:
    shape = blocks.shape
    fits = blocks.dtype == "U8" and len(shape) == 4 and shape[3] == _BLOCK // 2
    if not (
        isinstance(scales, DenseTensor)
        and fits
        and scales.dtype in ("U8", "F8_E8M0")
        and scales.shape == shape[:3]
    ):
        said = "no scales" if scales is None else f"scales {scales.dtype} {list(scales.shape)}"
        raise InputError(
            f"tensor {printable(blocks.name)} is {blocks.dtype} {list(shape)} with {said}, wanted "
            "U8 (experts, out, in / 32, 16) and U8 or F8_E8M0 (experts, out, in / 32)",
            path=path,
            hint="download the checkpoint again",
        )
    experts, out, groups, _ = shape

    def release() -> None:
        blocks.release()
        scales.release()

    return DenseTensor(
        name,
        dtype,
        (experts, groups * _BLOCK, out),
        partial(_decode, blocks, scales, dtype),
        release,
        (MXFP4, blocks.nbytes + scales.nbytes),
    )


def _decode(blocks: DenseTensor, scales: DenseTensor, dtype: str) -> memoryview:
    """Return the parameter's bytes, decoded in float32 expert by expert."""
    import torch

    experts, out, groups, _ = blocks.shape
    levels = torch.tensor(_LEVELS)
    codes, exponents = blocks.torch(), tensor_view(scales.load(), "U8", scales.shape)
    result = torch.empty(experts, groups * _BLOCK, out, dtype=torch_dtype(dtype))
    for expert in range(experts):
        pairs = codes[expert].int()
        values = levels[torch.stack([pairs & 0xF, pairs >> 4], dim=-1)].reshape(out, groups, _BLOCK)
        exponent = exponents[expert].int()
        factors = torch.ldexp(torch.ones(exponent.shape), exponent - _BIAS)
        factors[exponent == _NAN] = torch.nan
        result[expert] = values.mul_(factors[..., None]).reshape(out, -1).T
    return tensor_bytes(result)


CONVERTER = Converter(
    name="mxfp4",
    kind="base",
    summary="MXFP4 checkpoint of gpt-oss: experts in 4-bit blocks, decoded to bfloat16 exactly",
    sniff=sniff,
    read=read,
    read_with=read,
)
