"""Bundles in the exact shapes of public models, for measuring a trainer.

Each layer has its own bytes on disk, but they are copies of one layer's: making random weights
for a 70B model anew would take an hour. What is read, decoded and multiplied is as much.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from shapes import MixtureShape, Shape

from loraformat.bundle import converter
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, Provenance
from loraformat.model.nf4_parts import NF4Parts
from loraformat.ops.encoding.encode import QuantizationPolicy, quantized
from loraformat.plugins import WriteOptions
from loraformat.shards.layout import DEFAULT_SHARD_LIMIT
from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["write_bundle"]

_DEVIATION = 0.02


def write_bundle(shape: Shape | MixtureShape, target: Path) -> Path:
    """Write a bundle of random weights, its linears in NF4; one that is there is kept.

    Parameters
    ----------
    shape : Shape or MixtureShape
    target : Path

    Returns
    -------
    Path
        The bundle's directory.
    """
    if target.exists():
        return target
    model = Checkpoint(
        path=target,
        provenance=Provenance("random"),
        tensors={name: _tensor(name, dimensions) for name, dimensions in shape.tensors()},
        config=(json.dumps(shape.config(), indent=2, sort_keys=True) + "\n").encode(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with AtomicOutput(target, plan=shape.name) as publication:
        converter.write(model, publication, WriteOptions(DEFAULT_SHARD_LIMIT, lambda nbytes: None))
        publication.commit()
    return target


def _tensor(name: str, dimensions: tuple[int, ...]) -> LazyTensor:
    tensor = DenseTensor(name, "BF16", dimensions, partial(_random, dimensions))
    policy = QuantizationPolicy(stacks=True)
    if not policy.selects(tensor):
        return tensor
    return replace(quantized(tensor, policy, None), load=partial(_quantized, dimensions))


@cache
def _quantized(dimensions: tuple[int, ...]) -> NF4Parts:
    tensor = DenseTensor("weight", "BF16", dimensions, partial(_random, dimensions))
    return quantized(tensor, QuantizationPolicy(stacks=True), None).load()


def _random(dimensions: tuple[int, ...]) -> memoryview:
    values = torch.ones(dimensions, dtype=torch.bfloat16)
    if len(dimensions) > 1:
        values.normal_(0.0, _DEVIATION, generator=torch.Generator().manual_seed(dimensions[0]))
    return values.view(-1).view(torch.uint8).numpy().data
