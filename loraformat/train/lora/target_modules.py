"""The places of a model where a branch can be trained, as the LoRA side sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.utils.parametrize import register_parametrization

from loraformat.families.table import Family
from loraformat.train.engine.decoder import decoder_of, find_layers
from loraformat.train.engine.embedding import MappedEmbedding
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear, NF4Linear
from loraformat.train.engine.matrix import Tile
from loraformat.train.lora.target_module import TargetModule

__all__ = ["find_sites"]

_PLAIN = Family()
_Place = FrozenLinear | ExpertStack | MappedEmbedding


def find_sites(
    model: Any, sources: Mapping[str, Sequence[str]], family: Family = _PLAIN
) -> list[TargetModule]:
    """List the places of a model in its order.

    Those are the linears, fused experts and routers of the decoder, the token embedding and the
    output head; linears of other towers are not.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Assembled, with its layers numbered.
    sources : mapping of str to sequence of str
        The tensors of the bundle that each of its modules reads, and each parameter left in one.
    family : Family
        Says how PEFT reads the names of linears.

    Returns
    -------
    list of Site
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = []
    in_decoder = {id(module) for module in decoder_of(model).modules()}
    in_layers = {id(m) for layer in find_layers(model, "")[1] for m in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, MappedEmbedding) and module is embedding:
            found.append(_embedding(module, sources[name]))
        elif isinstance(module, ExpertStack) and module.layer is not None:
            found.append(_experts(module, sources[name]))
        elif isinstance(module, FrozenLinear) and (module is head or id(module) in in_decoder):
            found.append(_linear(module, sources[name], module is head, family))
        elif id(module) in in_layers:
            found += _parameters(module, name, sources)
    times = Counter(site.weight_name for site in found)
    return [replace(site, shared=times[site.weight_name] > 1) for site in found]


def _linear(
    module: FrozenLinear, sources: Sequence[str], head: bool, family: Family
) -> TargetModule:
    leaf = module.name.rpartition(".")[2]
    return TargetModule(
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
        in_layers=module.layer is not None,
        in_peft=(
            "refused" if leaf in family.refused_leaves
            else "parameter" if leaf in family.expert_leaves
            else "module"
        ),
    )  # fmt: skip


def _parameters(
    module: torch.nn.Module, name: str, sources: Mapping[str, Sequence[str]]
) -> Iterator[TargetModule]:
    """Yield the matrices that a module's own class computes with: those of routers."""
    for leaf, parameter in module.named_parameters(recurse=False):
        full = f"{name}.{leaf}"
        if parameter.ndim == 2 and full in sources:
            yield TargetModule(
                name=full,
                kind="parameter",
                in_features=parameter.shape[1],
                out_features=parameter.shape[0],
                tiles=partial(_whole, parameter),
                attach=partial(_parametrize, module, leaf),
                target=sources[full][0],
                device=parameter.device,
            )


def _whole(parameter: torch.Tensor, _: int) -> Iterator[Tile]:
    yield 0, len(parameter), parameter.detach().float()


def _parametrize(module: torch.nn.Module, leaf: str, branch: torch.nn.Module) -> None:
    """Let a module compute with a parameter that its branch has changed."""
    register_parametrization(module, leaf, branch, unsafe=True)


def _experts(module: ExpertStack, sources: Sequence[str]) -> TargetModule:
    return TargetModule(
        name=module.name,
        kind="experts",
        in_features=module.in_features,
        out_features=module.out_features,
        tiles=module.dense_tiles,
        attach=_attaching(module),
        target=sources[0] if len(sources) == 1 else "",
        experts=module.count,
        transposed=module.in_out_layout,
        quantized=module.quantized,
        device=module.device,
    )


def _embedding(module: MappedEmbedding, sources: Sequence[str]) -> TargetModule:
    def tiles(_: int) -> Iterator[Tile]:
        return module.dense_tiles()

    return TargetModule(
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
