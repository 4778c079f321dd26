"""Small in-memory models for converter tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from loraformat.model.checkpoint import (
    CarriedFile,
    Checkpoint,
    DenseTensor,
    LazyTensor,
    NF4Tensor,
    Provenance,
)
from loraformat.ops.encoding.encode import QuantizationPolicy, quantized
from loraformat.tensors.arrays import Array, array_bytes, dtype_name, numpy_dtype
from loraformat.tensors.torch_arrays import array_of

if TYPE_CHECKING:
    import torch

__all__ = ["carried", "checkpoint", "dense", "nf4", "samples"]

_F32, _F16, _BF16 = (numpy_dtype(name) for name in ("F32", "F16", "BF16"))


def dense(name: str, values: Array | torch.Tensor) -> DenseTensor:
    r"""Return a lazy tensor that holds these values.

    Examples
    --------
    >>> tensor = dense("model.norm.weight", numpy.ones(4, numpy_dtype("BF16")))
    >>> tensor.dtype, tensor.shape, bytes(tensor.load()[:2])
    ('BF16', (4,), b'\x80?')
    """
    array = values if isinstance(values, numpy.ndarray) else array_of(values)
    data = bytes(array_bytes(array))
    return DenseTensor(name, dtype_name(array.dtype), array.shape, lambda: memoryview(data))


def nf4(
    name: str, weight: Array | torch.Tensor, *, block_size: int = 64, double_quant: bool = True,
    model_type: str | None = None,
) -> NF4Tensor:  # fmt: skip
    """Return a weight in NF4; it is quantized whenever it is loaded.

    Examples
    --------
    >>> tensor = nf4("model.layers.0.mlp.up_proj.weight", numpy.ones((2, 64), numpy.float32))
    >>> tensor.nbytes, sorted(tensor.load().by_suffix())[:2]
    (70, ['', '.absmax'])
    """
    policy = QuantizationPolicy(block_size, double_quant)
    return quantized(dense(name, weight), policy, model_type)


def checkpoint(
    *tensors: LazyTensor,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    r"""Return a model made of these tensors.

    Parameters
    ----------
    *tensors : LazyTensor
    config : mapping, optional
        Becomes ``config.json`` in the form that transformers writes.
    files : mapping of str to bytes, optional
        Files that travel along, by path.

    Examples
    --------
    >>> head = dense("lm_head.weight", numpy.ones((2, 2), numpy.float32))
    >>> model = checkpoint(head, config={"vocab_size": 2})
    >>> list(model.tensors), model.config
    (['lm_head.weight'], b'{\n  "vocab_size": 2\n}\n')
    """
    text = None if config is None else json.dumps(config, indent=2, sort_keys=True) + "\n"
    return Checkpoint(
        path=Path("memory"),
        provenance=Provenance("memory"),
        tensors={tensor.name: tensor for tensor in tensors},
        config=None if text is None else text.encode(),
        files=tuple(carried(path, data) for path, data in (files or {}).items()),
    )


def carried(path: str, data: bytes) -> CarriedFile:
    """Make a file that travels along."""
    return CarriedFile.of(path, data)


def samples(stores: str) -> dict[str, Checkpoint]:
    """Return models with all that a format may meet, as far as its writer takes them.

    Parameters
    ----------
    stores : {"nf4", "dense", "both"}
        As in `loraformat.plugins.BaseFormat`.
    """
    found = {"weights": _weights(), "odd names": _odd_names(), "odd shapes": _odd_shapes()}
    if stores == "dense":
        return found
    if stores == "nf4":  # such a format is about NF4: each model holds some
        found = {name: _with_nf4(model) for name, model in found.items()}
    return found | {
        "NF4": _with_nf4(_weights()),
        "NF4 without double quantization": _with_nf4(_weights(), double_quant=False),
        "NF4 in large blocks": _with_nf4(_weights(), block_size=1024),
        "NF4 of Conv1D": _conv1d(),
    }


def _weights() -> Checkpoint:
    """Return all that stands in an ordinary model: three float types, config, other files."""
    random = numpy.random.default_rng(0)

    def weight(name: str, *shape: int, dtype: numpy.dtype[Any] = _BF16) -> DenseTensor:
        return dense(name, random.standard_normal(shape, numpy.float32).astype(dtype))

    return checkpoint(
        weight("model.embed_tokens.weight", 24, 64),
        weight("model.layers.0.self_attn.q_proj.weight", 64, 64),
        weight("model.layers.0.self_attn.q_proj.bias", 64, dtype=_F16),
        weight("model.layers.0.input_layernorm.weight", 64, dtype=_F32),
        weight("model.layers.1.self_attn.q_proj.weight", 64, 64, dtype=_F16),
        weight("model.norm.weight", 64, dtype=_F32),
        weight("lm_head.weight", 24, 64, dtype=_F32),
        config={"architectures": ["Sample"], "dtype": "bfloat16", "model_type": "sample", "é": "ü"},
        files={
            "README.md": "# Größe\r\n".encode(),
            "chat_template.jinja": b"{{ messages }}",
            "tokenizer.json": b'{"version": "1.0"}',
            "1_Pooling/config.json": b"{}",
            "vocab.txt": bytes(range(256)),
        },
    )


def _odd_names() -> Checkpoint:
    names = [
        "a",
        "α.β🙂",
        "with space",
        "'quoted' \"name\"",
        "x.weight.absmaxx",
        "...",
        "CON",
        "n" * 255,
    ]
    return checkpoint(*(dense(name, numpy.full(1, i, _F32)) for i, name in enumerate(names)))


def _odd_shapes() -> Checkpoint:
    def values(name: str, dtype: str, *shape: int) -> DenseTensor:
        return dense(name, numpy.arange(prod(shape)).reshape(shape).astype(numpy_dtype(dtype)))

    return checkpoint(
        values("scalar", "F32"),
        values("empty", "F16", 0),
        values("empty.rows", "BF16", 0, 7),
        values("cube", "BF16", 3, 1, 5),
        values("i64", "I64", 3),
        values("i32", "I32", 2, 2),
        values("u8", "U8", 5),
        values("bool", "BOOL", 3),
        values("f64", "F64", 3),
        dense("special", numpy.array([numpy.nan, numpy.inf, -0.0, 1e-45], _F32)),
    )


def _with_nf4(model: Checkpoint, *, block_size: int = 64, double_quant: bool = True) -> Checkpoint:
    random = numpy.random.default_rng(1)
    shapes = {"up_proj": (128, 64), "down_proj": (64, 128), "odd_proj": (3, 25)}
    weights = [
        nf4(
            f"model.layers.0.mlp.{kind}.weight", random.standard_normal(shape, numpy.float32),
            block_size=block_size, double_quant=double_quant,
        )
        for kind, shape in shapes.items()
    ]  # fmt: skip
    return replace(model, tensors={**model.tensors, **{weight.name: weight for weight in weights}})


def _conv1d() -> Checkpoint:
    """Return a model whose linears are stored transposed, as in GPT-2."""
    weight = numpy.random.default_rng(2).standard_normal((64, 192), numpy.float32)
    return checkpoint(
        nf4("transformer.h.0.attn.c_attn.weight", weight, model_type="gpt2"),
        dense("transformer.wte.weight", numpy.ones((8, 64), _F32)),
        config={"model_type": "gpt2"},
    )
