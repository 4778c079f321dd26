"""Target modules: what a LoRA branch needs of a module, which ones a model has, which are trained.

The engine's layers describe themselves by a `TargetModule`; the LoRA side knows nothing else of
them: a name, a shape, the weight in tiles, and where the branch goes.

Targets are chosen without regular expressions: a word for a group, a name, the last parts of a
name, or a glob of either. A target that matches nothing is an error that names the nearest; a run
that trains less than it was asked to is found out too late otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.utils.parametrize import register_parametrization

from loraformat.errors import UsageError, nearest, printable
from loraformat.families.table import Family
from loraformat.train.engine.embedding import MappedEmbedding
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import Tile
from loraformat.train.engine.meta_model import decoder_of, find_layers
from loraformat.train.lora.options import LoraOptions

__all__ = ["GROUPS", "TargetModule", "find_target_modules", "matches", "resolve"]

_PLAIN = Family()

_ATTENTION = re.compile(r"(^|\.)(\w*attn|\w*attention)(\.|$)")
_MLP = re.compile(
    r"(^|\.)(\w*mlp|feed_forward|ffn|\w*moe|\w*experts?)(\.|$)|\.(fc\d*|fc_in|fc_out)$"
)
#: Routers send tokens to experts; "all-linear" does not include them.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A place where a branch can be trained.

    Attributes
    ----------
    name : str
        Of the module in transformers' model; of experts, the name of their parameter
        (``model.layers.0.mlp.experts.down_proj``), and of a router (``...mlp.gate.weight``).
    kind : {"linear", "head", "embedding", "experts", "parameter"}
        A linear of a decoder layer, the output head, the token embedding, a stack of linears, or
        a matrix that its class multiplies by itself: that of a router.
    in_features, out_features : int
        Of y = W x. Of an embedding: tokens and width.
    tiles : callable
        ``tiles(expert)`` yields (first row, row after the last, float32 tile) of the weight as
        the model computes with it, in order; the expert's number is 0 where there are none. A
        tile is (rows, in); of an embedding the rows are tokens: (rows, out). It is only valid
        until the next one is taken, and must not be written to.
    attach : callable
        Gives the layer its branch.
    target : str
        Name of the weight in the bundle; that of the module with ``.weight`` if it is empty.
    experts : int
        Matrices in the stack; 0 where there is none.
    transposed : bool
        The bundle holds the weight as (in, out), and so a delta of it: ``Conv1D`` and a few
        models' experts.
    quantized : bool
        The bundle holds the weight in NF4.
    bias : torch.Tensor or None
        (out,), added to the product before the branch sees it.
    output_scale : float
        What the layer multiplies its rows by before the branch sees them (Gemma's embedding).
    device : torch.device or None
        Where the layer computes; None for the CPU.
    in_peft : {"module", "parameter", "refused"}
        What PEFT wraps to adapt a linear; see `is_parameter`.
    shared : bool
        Other places compute with the same weight, and a delta of it would act in all of them.
    in_layers : bool
        It stands in a decoder layer; what does not is trained if it is named.
    """

    name: str
    kind: Literal["linear", "head", "embedding", "experts", "parameter"]
    in_features: int
    out_features: int
    tiles: Callable[[int], Iterator[tuple[int, int, torch.Tensor]]]
    attach: Callable[[torch.nn.Module], object]
    target: str = ""
    experts: int = 0
    transposed: bool = False
    quantized: bool = False
    bias: torch.Tensor | None = None
    output_scale: float = 1.0
    device: torch.device | None = None
    in_peft: Literal["module", "parameter", "refused"] = "module"
    shared: bool = False
    in_layers: bool = True

    @property
    def is_parameter(self) -> bool:
        """Tell whether PEFT adapts a parameter here, which has neither dropout nor magnitude."""
        return self.kind in ("experts", "parameter") or self.in_peft == "parameter"

    @property
    def weight_name(self) -> str:
        """Name of the weight in the bundle."""
        return self.target or self.stored_name

    @property
    def stored_name(self) -> str:
        """Name of the weight in transformers' model."""
        return self.name if self.kind in ("experts", "parameter") else f"{self.name}.weight"


def find_target_modules(
    model: Any, sources: Mapping[str, Sequence[str]], family: Family = _PLAIN
) -> list[TargetModule]:
    """List the places of a model in its order.

    Those are the linears, fused experts and routers of the decoder, the token embedding and the
    output head; linears of other towers are not. The model's weights are bound and its layers
    numbered; `sources` are the tensors of the bundle that each of its modules reads, and each
    parameter left in one. The family says how PEFT reads the names of linears.
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
    times = Counter(target.weight_name for target in found)
    return [replace(target, shared=times[target.weight_name] > 1) for target in found]


def _linear(
    module: FrozenLinear, sources: Sequence[str], head: bool, family: Family
) -> TargetModule:
    leaf = module.name.rpartition(".")[2]
    return TargetModule(
        name=module.name,
        kind="head" if head else "linear",
        in_features=module.in_features,
        out_features=module.out_features,
        tiles=lambda _: module.dense_tiles(),
        attach=partial(setattr, module, "branch"),
        # A tied head reads the embedding's tensor, and its own delta is not the embedding's.
        target="" if head else sources[0],
        transposed=module.conv1d,
        quantized=module.quantized,
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
                attach=partial(register_parametrization, module, leaf, unsafe=True),
                target=sources[full][0],
                device=parameter.device,
            )


def _whole(parameter: torch.Tensor, _: int) -> Iterator[Tile]:
    yield 0, len(parameter), parameter.detach().float()


def _experts(module: ExpertStack, sources: Sequence[str]) -> TargetModule:
    return TargetModule(
        name=module.name,
        kind="experts",
        in_features=module.in_features,
        out_features=module.out_features,
        tiles=module.dense_tiles,
        attach=partial(setattr, module, "branch"),
        target=sources[0] if len(sources) == 1 else "",
        experts=module.count,
        transposed=module.in_out_layout,
        quantized=module.quantized,
        device=module.device,
    )


def _embedding(module: MappedEmbedding, sources: Sequence[str]) -> TargetModule:
    return TargetModule(
        name=module.name,
        kind="embedding",
        in_features=module.num_embeddings,
        out_features=module.embedding_dim,
        tiles=lambda _: module.dense_tiles(),
        attach=partial(setattr, module, "branch"),
        target=sources[0],
        output_scale=float(getattr(module.original, "embed_scale", 1.0)),
        device=module.table.device,
    )


def _is_linear(target: TargetModule) -> bool:
    return (
        target.kind in ("linear", "experts")
        and target.in_layers
        and target.in_peft != "refused"
        and not target.shared
        and not _ROUTER.search(target.name)
    )


def _is_attention(target: TargetModule) -> bool:
    return _is_linear(target) and bool(_ATTENTION.search(target.name))


def _is_mlp(target: TargetModule) -> bool:
    return _is_linear(target) and not _is_attention(target) and bool(_MLP.search(target.name))


_GLOB = re.compile(r"[*?\[]")

#: Words that stand for groups.
GROUPS: dict[str, Callable[[TargetModule], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "mlp": _is_mlp,
}


def matches(name: str, pattern: str) -> bool:
    """Tell whether a name or pattern matches a module.

    Examples
    --------
    >>> matches("model.layers.0.self_attn.q_proj", "q_proj")
    True
    >>> matches("model.layers.11.self_attn.q_proj", "layers.1?.*.q_proj")
    True
    >>> matches("model.layers.0.self_attn.q_proj", "proj")
    False
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def resolve(targets: Sequence[TargetModule], options: LoraOptions) -> dict[str, int]:
    """Return the rank of every place that is trained, by name, in the model's order.

    Parameters
    ----------
    targets : sequence of TargetModule
    options : LoraOptions

    Raises
    ------
    UsageError
        If a target or a rank's pattern means nothing, naming the nearest.
    """
    chosen = {target.name for word in options.targets for target in _meant(targets, word)}
    for kind, wanted in (("embedding", options.embeddings), ("head", options.head)):
        found = [target.name for target in targets if wanted and target.kind == kind]
        if wanted and not found:
            raise UsageError(f"this model has no {kind} that can be trained")
        chosen.update(found)
    names = [target.name for target in targets if target.name in chosen]
    ranks = dict.fromkeys(names, options.rank)
    for pattern, rank in options.named():
        found = [name for name in names if matches(name, pattern)]
        if not found:
            raise UsageError(
                f"the rank of {printable(pattern)} is of no module that is trained"
                + _nearest(pattern, names)
            )
        ranks.update(dict.fromkeys(found, rank))
    return ranks


def _meant(targets: Sequence[TargetModule], word: str) -> list[TargetModule]:
    group = GROUPS.get(word)
    found = [target for target in targets if (group(target) if group else _is_named(target, word))]
    if shared := [target for target in found if target.shared]:
        raise UsageError(
            f"{printable(shared[0].name)} shares its weight with other layers: PEFT would adapt "
            "one of them, and a merge all",
            hint="omit it; all-linear does",
        )
    if refused := [target for target in found if target.in_peft == "refused"]:
        raise UsageError(
            f"PEFT does not adapt {printable(refused[0].name)}: a state-space kernel multiplies "
            "by its weight",
            hint="omit it; all-linear does",
        )
    if found:
        return found
    names = [target.name for target in targets]
    raise UsageError(
        f"target {printable(word)} is not a module of this model" + _nearest(word, names),
        hint=f"wanted {', '.join(GROUPS)}, the name of a module, its last part, or a glob",
    )


def _is_named(target: TargetModule, word: str) -> bool:
    """Tell whether a word matches a module; a router is matched by its name, not by a glob."""
    if target.kind == "parameter" and _GLOB.search(word):
        return False
    return matches(target.name, word)


def _nearest(word: str, names: Iterable[str]) -> str:
    """Return words that name the most similar last part, or the most similar name."""
    names = list(names)
    last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return nearest(word, names if "." in word else [*GROUPS, *last_parts])
