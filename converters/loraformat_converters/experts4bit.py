"""Experts as the module `Experts4bit` stores them: bitsandbytes#1965, experts4bit-qlora.

Of ``gate_up_proj`` (experts, 2 * intermediate, hidden) and ``down_proj`` (experts, hidden,
intermediate), the codes of an expert are a row of uint8 under that name, and its float32 scales a
row of ``gate_up_absmax`` and ``down_absmax``. Shapes and dtype are not stored, but follow from the
config.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.config_json import model_dtype
from loraformat.model.nf4_parts import NF4Parts
from loraformat.model.packed_weights import ORIGINAL
from loraformat.nf4.quant_state import BLOCK_SIZES, QuantState
from loraformat.nf4.tables import LEVEL_BYTES
from loraformat.tensors.arrays import array_view
from loraformat.tensors.dtypes import TORCH_NAMES

__all__ = ["with_experts4bit"]

_DTYPES = {torch: name for name, torch in TORCH_NAMES.items()}


def with_experts4bit(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return a model's tensors, with such codes and scales as stacks in segments.

    Raises
    ------
    InputError
        If codes and scales do not fit each other or the config.
    UnsupportedError
        If the config says that the codes are FP4.
    """
    tensors = dict(checkpoint.tensors)
    for name, codes in checkpoint.tensors.items():
        scales = tensors.get(name.removesuffix("_proj") + "_absmax")
        is_codes = isinstance(codes, DenseTensor) and (codes.dtype, len(codes.shape)) == ("U8", 2)
        if is_codes and isinstance(scales, DenseTensor) and name.endswith(".gate_up_proj"):
            kind = (checkpoint.quantization_config or {}).get("bnb_4bit_quant_type", "nf4")
            if kind != "nf4":
                raise UnsupportedError(
                    f"has experts in {printable(kind)}, not NF4",
                    path=checkpoint.path,
                    hint=ORIGINAL,
                )
            for one in (name, f"{name.removesuffix('.gate_up_proj')}.down_proj"):
                _put_together(checkpoint, config, tensors, one)
    return tensors


def _put_together(
    checkpoint: Checkpoint, config: Mapping[str, Any], tensors: dict[str, LazyTensor], name: str
) -> None:
    place = name.removesuffix("_proj") + "_absmax"
    codes, scales = tensors.get(name), tensors.pop(place, None)
    if not isinstance(codes, DenseTensor) or not isinstance(scales, DenseTensor):
        raise _broken(checkpoint, name, f"has no codes, or no scales {printable(place)}")
    wanted = ("U8", "F32", 2, 2)
    if (codes.dtype, scales.dtype, len(codes.shape), len(scales.shape)) != wanted:
        raise _broken(checkpoint, name, "and its scales are not rows of U8 and of F32")
    (experts, half), (others, blocks) = codes.shape, scales.shape
    text = config.get("text_config")
    hidden = (text if isinstance(text, dict) else config).get("hidden_size")
    if type(hidden) is not int or hidden < 1 or experts < 1 or 2 * half % hidden or half < 1:
        problem = f"has {2 * half} numbers of each expert, not whole rows of hidden_size"
        raise _broken(checkpoint, name, f"{problem} {printable(hidden)}")
    block_size = 2 * half // max(blocks, 1)
    if experts != others or block_size not in BLOCK_SIZES or block_size * blocks != 2 * half:
        problem = f"has scales {list(scales.shape)} for codes {list(codes.shape)}"
        raise _broken(checkpoint, name, problem)
    down = name.endswith(".down_proj")
    matrix = (hidden, 2 * half // hidden) if down else (2 * half // hidden, hidden)
    dtype = _DTYPES.get(model_dtype(checkpoint.config) or "", "F32")
    state = QuantState((experts, *matrix), dtype, block_size, segments=experts)
    load = partial(_load, checkpoint, codes, scales, state)

    def release() -> None:
        codes.release()
        scales.release()

    tensors[name] = NF4Tensor(
        name, dtype, state.shape, block_size, False, False, load, release, experts
    )


def _load(
    checkpoint: Checkpoint, codes: DenseTensor, scales: DenseTensor, state: QuantState
) -> NF4Parts:
    absmax = scales.load()
    if not numpy.isfinite(array_view(absmax, "F32")).all():
        raise _broken(checkpoint, codes.name, "has a scale that is not finite")
    return NF4Parts(
        packed=codes.load(),
        absmax=absmax,
        nested_absmax=None,
        quant_map=memoryview(LEVEL_BYTES),
        nested_quant_map=None,
        quant_state=state.encode(),
        segments=state.segments,
    )


def _broken(checkpoint: Checkpoint, name: str, problem: str) -> InputError:
    return InputError(
        f"stack of experts {printable(name)} {problem}",
        path=checkpoint.path,
        hint="download or save the checkpoint again",
    )
