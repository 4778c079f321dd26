"""Layouts of an adapter's experts: one delta for each, or one for the parameter of all.

transformers 5 has the experts of a layer in one parameter for each projection, and PEFT adapts that
(``target_parameters``). Checkpoints of most families, vLLM and SGLang have the linears of each
expert. What belongs to which rows is asked of transformers' conversion of the base, or known of the
families whose experts PEFT converts itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.families.expert_names import EXPERT_LEAVES, spelled_in_memory, spelled_on_disk
from loraformat.families.table import family_of
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.architecture import is_expert_stack
from loraformat.model.base_names import BaseNames, names_of
from loraformat.model.base_names.in_memory import bare
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.expert_deltas import apart, fused, repeated, stacked
from loraformat.model.tied_head import config_of

__all__ = [
    "ExpertLayout",
    "has_single_experts",
    "is_named_stack",
    "is_of_one_expert",
    "needs_fusing",
    "rearranged",
    "with_fused_experts",
]

ExpertLayout = Literal["each", "fused"]

#: More than any model has; a name for each must not cost a hostile file's reader its memory.
_MOST_EXPERTS = 1 << 16
_ONE = re.compile(r"\.experts\.([0-9]{1,6})\.")
#: Stacks by the name of a linear, as SGLang and vLLM take them (``--experts-shared-outer-loras``,
#: ``--enable-moe-shared-loras``) and Tinker writes them, and what checkpoints may call it.
_STACK = re.compile(r"(.+\.experts)\.(w[123]|gate_proj|up_proj|down_proj)\.weight")
_ALIKE = {
    "w1": ("w1", "gate_proj"), "w2": ("w2", "down_proj"), "w3": ("w3", "up_proj"),
    "gate_proj": ("gate_proj", "w1"), "down_proj": ("down_proj", "w2"),
    "up_proj": ("up_proj", "w3"),
}  # fmt: skip


class _Place(NamedTuple):
    """Where a linear of an expert lies in its parameter: which expert, which run of rows."""

    parameter: str
    expert: int
    part: int


def is_of_one_expert(target: str) -> bool:
    """Tell whether a tensor belongs to a single expert.

    Examples
    --------
    >>> is_of_one_expert("model.layers.0.mlp.experts.12.gate_proj.weight")
    True
    >>> is_of_one_expert("model.layers.0.mlp.experts.gate_up_proj")
    False
    """
    return _ONE.search(target) is not None


def is_named_stack(delta: LoraDelta) -> bool:
    """Tell whether a delta is of all experts under the name of a linear of theirs."""
    return len(delta.a.shape) == 3 and _STACK.fullmatch(delta.target) is not None


def has_single_experts(base: Checkpoint) -> bool:
    """Tell whether the linears of a base's experts have names of their own in checkpoints."""
    of_experts = (is_expert_stack(name) or is_of_one_expert(name) for name in base.tensors)
    if base.tensors and not any(of_experts):
        return False  # without asking transformers
    return bool(_tensors(base, names_of(base)))


def needs_fusing(adapter: Adapter, base: Checkpoint) -> bool:
    """Tell whether an adapter has deltas of experts that only the base's parameters can take."""
    return any(
        is_named_stack(delta) or (is_of_one_expert(target) and target not in base.tensors)
        for target, delta in adapter.deltas.items()
    )


def rearranged(adapter: Adapter, base: Checkpoint, layout: ExpertLayout | None) -> Adapter:
    """Return an adapter with its experts in a layout, with the same effect.

    Parameters
    ----------
    adapter : Adapter
        Read against the base.
    base : Checkpoint
    layout : {"each", "fused"} or None
        None leaves the experts as they are, unless PEFT cannot load them so.

    Raises
    ------
    UnsupportedError
        If the base's experts have no such layout, or an expert has more than a low-rank delta.
    """
    if layout == "each":
        return _with_single_experts(adapter, base)
    if layout == "fused" or (_has_singles(adapter) and not _converted_by_peft(adapter, base)):
        return with_fused_experts(adapter, base)
    return adapter


def _has_singles(adapter: Adapter) -> bool:
    return any(map(is_of_one_expert, adapter.deltas))


def _converted_by_peft(adapter: Adapter, base: Checkpoint) -> bool:
    """Tell whether PEFT makes the parameters' deltas of those of single experts by itself.

    It does for some families, for all experts at once, of one rank, and takes every linear of a
    like name for theirs.
    """
    leaves = family_of(config_of(base)).expert_leaves
    singles = {name: delta for name, delta in adapter.deltas.items() if is_of_one_expert(name)}
    named = {name.removesuffix(".weight").rpartition(".")[2] for name in singles}
    others = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.deltas
              if name not in singles}  # fmt: skip
    if not named <= leaves or others & leaves or len({d.rank for d in singles.values()}) != 1:
        return False
    tensors, there = _tensors(base, _names(base, adapter)), {_key(name) for name in singles}
    touched = {place.parameter for place in _places(tensors, there)}
    return all(_key(name) in there for parameter in touched for parts in tensors[parameter]
               for name in parts)  # fmt: skip


def _places(tensors: Mapping[str, list[list[str]]], keys: set[str]) -> Iterator[_Place]:
    owners = _owners(tensors)
    return (owners[key] for key in keys if key in owners)


def with_fused_experts(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter whose deltas of experts are those of the base's parameters.

    Raises
    ------
    UnsupportedError
        If nothing says which rows of a parameter belong to an expert's linears.
    """
    names = _names(base, adapter)
    tensors = _tensors(base, names)
    owners = _owners(tensors)
    kept: dict[str, LoraDelta] = {}
    members: dict[str, dict[int, dict[int, LoraDelta]]] = {}
    stacks: dict[str, dict[int, LoraDelta]] = {}
    for target, delta in adapter.deltas.items():
        if not is_of_one_expert(target) and not is_named_stack(delta):
            kept[target] = delta
            continue
        place = _place(target, owners)
        if place is None:
            raise _unknown(adapter, target)
        _refuse_more(adapter, delta)
        if is_named_stack(delta):
            experts = len(tensors[place.parameter])
            stacks.setdefault(place.parameter, {})[place.part] = _of_all(adapter, delta, experts)
        else:
            parts = members.setdefault(place.parameter, {})
            parts.setdefault(place.part, {})[place.expert] = delta
    for parameter, parts in members.items():
        experts = len(tensors[parameter])
        for part, ones in parts.items():
            if part in stacks.get(parameter, {}):
                raise _twice(adapter, parameter)
            _check_alike(adapter, ones)
            stacks.setdefault(parameter, {})[part] = stacked(parameter, ones, experts)
    for parameter, halves in stacks.items():
        found = names.parameter(parameter)
        target = parameter if found is None else found.target
        if target in kept:
            raise _twice(adapter, target)
        single = len(tensors[parameter][0]) == 1
        kept[target] = replace(halves[0], target=target) if single else fused(target, halves)
    gone = adapter.deltas.keys() - kept.keys()
    spellings = {name: said for name, said in adapter.spellings.items() if name not in gone}
    return replace(adapter, deltas=kept, spellings=spellings)


def _with_single_experts(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter with a delta for each linear of each expert, as checkpoints name them."""
    found = _tensors(base, _names(base, adapter))
    tensors = {_key(parameter): parts for parameter, parts in found.items()}
    deltas: dict[str, LoraDelta] = {}
    for target, delta in adapter.deltas.items():
        if len(delta.a.shape) != 3:
            made = [delta]
        elif (parts := tensors.get(_key(target))) is None or delta.orientation != "linear":
            raise UnsupportedError(
                f"{printable(target)}: nothing says which of its rows are those of which linear of "
                "an expert, as the checkpoints of this model have its experts fused",
                path=adapter.path,
                hint="use it as it is: runtimes that serve this model take fused experts "
                "(--experts fused)",
            )
        else:
            made = list(apart(delta, parts))
        for one in made:
            if one.target in deltas:
                raise _twice(adapter, one.target)
            deltas[one.target] = one
    spellings = {name: said for name, said in adapter.spellings.items() if name in deltas}
    return replace(adapter, deltas=deltas, spellings=spellings)


def _key(name: str) -> str:
    """Return a name without what versions of transformers and checkpoints spell differently."""
    return bare(spelled_in_memory(name))


def _names(base: Checkpoint, adapter: Adapter) -> BaseNames:
    return names_of(base, adapter.config.get("task_type"))


def _owners(tensors: Mapping[str, list[list[str]]]) -> dict[str, _Place]:
    return {
        _key(name): _Place(parameter, expert, part)
        for parameter, experts in tensors.items()
        for expert, parts in enumerate(experts)
        for part, name in enumerate(parts)
    }


def _place(target: str, owners: Mapping[str, _Place]) -> _Place | None:
    match = _STACK.fullmatch(target)
    if match is None:
        return owners.get(_key(target))
    names = (f"{match[1]}.0.{leaf}.weight" for leaf in _ALIKE[match[2]])
    return next((owners[_key(name)] for name in names if _key(name) in owners), None)


def _tensors(base: Checkpoint, names: BaseNames) -> dict[str, list[list[str]]]:
    """Return by parameter and expert what checkpoints call the linears, in the order of rows."""
    memory = names.memory
    if memory is None:
        return _known_of_family(base, names)
    found = {
        name: experts
        for name, experts in memory.sources.stacked.items()
        if all(_ONE.search(tensor) for parts in experts for tensor in parts)
    }
    for name, shape in memory.shapes.items():
        if name not in found and ".experts." in name and _is_stack(shape):
            experts = memory.expert_names(name)
            if experts and all(map(_ONE.search, experts[0])):
                found[name] = experts
    return found


def _is_stack(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and all(shape) and shape[0] <= _MOST_EXPERTS


def _known_of_family(base: Checkpoint, names: BaseNames) -> dict[str, list[list[str]]]:
    """Return what `_tensors` does, without transformers: of the families that PEFT converts."""
    family = family_of(config_of(base))
    if not family.expert_leaves or family.transposed_experts:
        return {}
    like_mixtral = "w1" in family.expert_leaves
    found = {}
    for parameter, experts in _numbers_of_experts(names).items():
        home, _, leaf = parameter.rpartition(".")
        leaves = EXPERT_LEAVES[leaf][1 if like_mixtral else 0]
        there = spelled_on_disk(home) if like_mixtral else home
        found[parameter] = [
            [f"{there}.{expert}.{part}.weight" for part in leaves] for expert in range(experts)
        ]
    return found


def _numbers_of_experts(names: BaseNames) -> dict[str, int]:
    """Return the number of experts of each parameter of theirs, stored so or one by one."""
    leaves = tuple(f".experts.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
    found = {
        name: shape[0]
        for name, shape in names.shapes.items()
        if name.endswith(leaves) and _is_stack(shape)
    }
    homes: dict[str, set[str]] = {}
    for name in names.shapes:
        if (match := _ONE.search(name)) is not None:
            home = spelled_in_memory(name[: match.end()]).rpartition(".experts.")[0]
            homes.setdefault(home, set()).add(match[1])
    for home, numbers in homes.items():
        found |= {f"{home}{leaf}": len(numbers) for leaf in leaves}
    return found


def _of_all(adapter: Adapter, delta: LoraDelta, experts: int) -> LoraDelta:
    if {delta.a.shape[0], delta.b.shape[0]} <= {1, experts}:
        return repeated(delta, experts)
    raise InputError(
        f"{printable(delta.target)}: A {list(delta.a.shape)} and B {list(delta.b.shape)} are not "
        f"for {experts} experts, nor one for all",
        path=adapter.path,
        hint="was it made for another base?",
    )


def _check_alike(adapter: Adapter, members: Mapping[int, LoraDelta]) -> None:
    first = next(iter(members.values()))
    for delta in members.values():
        if (delta.out_features, delta.in_features) != (first.out_features, first.in_features):
            raise InputError(
                f"{printable(first.target)} and {printable(delta.target)} differ in shape",
                path=adapter.path,
                hint="was it made for another base?",
            )


def _refuse_more(adapter: Adapter, delta: LoraDelta) -> None:
    if delta.magnitude is None and delta.bias is None:
        return
    what = "a magnitude (DoRA)" if delta.magnitude is not None else "a bias (lora_bias)"
    raise UnsupportedError(
        f"{printable(delta.target)} has {what}, which the delta of a parameter of all experts "
        "cannot have",
        path=adapter.path,
        hint="merge it into a base that stores its experts one by one",
    )


def _unknown(adapter: Adapter, target: str) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(target)}: nothing says which rows of the base's experts it changes",
        path=adapter.path,
        hint="convert it with the checkpoint that it was trained on, which stores its experts one "
        "by one: loraformat convert ADAPTER OUT --experts fused --base ORIGINAL",
    )


def _twice(adapter: Adapter, name: str) -> InputError:
    return InputError(f"changes {printable(name)} twice, in two layouts", path=adapter.path)
