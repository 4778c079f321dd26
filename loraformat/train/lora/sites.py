"""The places of a model where a branch can be trained, as the LoRA side sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from loraformat.train.engine.embedding import MappedEmbedding
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear, NF4Linear
from loraformat.train.engine.matrix import Tile
from loraformat.train.lora.site import Site

__all__ = ["find_sites"]

_Place = FrozenLinear | ExpertStack | MappedEmbedding


def find_sites(model: Any, sources: Mapping[str, Sequence[str]]) -> list[Site]:
    """List the places of a model in its order.

    Those are the linears and fused experts of the decoder layers, the token embedding and the
    output head; linears of other towers are not.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Assembled, with its layers numbered.
    sources : mapping of str to sequence of str
        The tensors of the bundle that each of its modules reads.

    Returns
    -------
    list of Site
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MappedEmbedding) and module is embedding:
            found.append(_embedding(module, sources[name]))
        elif isinstance(module, ExpertStack) and module.layer is not None:
            found.append(_experts(module, sources[name]))
        elif isinstance(module, FrozenLinear) and (module is head or module.layer is not None):
            found.append(_linear(module, sources[name], module is head))
    return found


def _linear(module: FrozenLinear, sources: Sequence[str], head: bool) -> Site:
    return Site(
        name=module.name,
        kind="head" if head else "linear",
        in_features=module.in_features,
        out_features=module.out_features,
        tiles=lambda expert: module.dense_tiles(),
        attach=_attaching(module),
        # A tied head reads the embedding's tensor, and its own delta is not the embedding's.
        target="" if head else sources[0],
        transposed=module.conv1d,
        quantized=isinstance(module, NF4Linear),
        bias=module.bias,
        device=module.device,
    )


def _experts(module: ExpertStack, sources: Sequence[str]) -> Site:
    return Site(
        name=module.name,
        kind="experts",
        in_features=module.in_features,
        out_features=module.out_features,
        tiles=module.dense_tiles,
        attach=_attaching(module),
        target=sources[0] if len(sources) == 1 else "",
        experts=module.count,
        transposed=module.by_inputs,
        quantized=module.quantized,
        device=module.device,
    )


def _embedding(module: MappedEmbedding, sources: Sequence[str]) -> Site:
    def tiles(_: int) -> Iterator[Tile]:
        return module.dense_tiles()

    return Site(
        name=module.name,
        kind="embedding",
        in_features=module.num_embeddings,
        out_features=module.embedding_dim,
        tiles=tiles,
        attach=_attaching(module),
        target=sources[0],
        output_scale=float(getattr(module.original, "embed_scale", 1.0)),
        device=module.table.device,
    )


def _attaching(module: _Place) -> Callable[[torch.nn.Module], None]:
    def attach(branch: torch.nn.Module) -> None:
        module.branch = branch

    return attach
