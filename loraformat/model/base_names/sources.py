"""The checkpoint tensors that form each model parameter.

transformers renames some tensors when it loads them, stacks the experts of a mixture into one
parameter and cuts fused projections apart; its own table of these conversions is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loraformat.families.tensor_names import natural

__all__ = ["MISSING", "Chunk", "Sources", "conversions_of", "expert_names", "find_sources"]

#: What is said of a parameter whose tensors are not all there.
MISSING = "tensors of some of its experts are missing"
_STACKING = {"MergeModulelist", "Concatenate"}
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Chunk(NamedTuple):
    """A parameter that is one of several equal runs of a tensor's rows."""

    tensor: str
    number: int
    of: int


def expert_names(table: Conversions, target: str, experts: int) -> list[list[str]]:
    """Return the names under which a fused parameter's experts would be stored one by one.

    Of each expert, those of the matrices that lie one below the other in memory; none if the class
    has no such form. Renamings of other parts of names are not undone: the result has the names
    that transformers reads, not always those that it writes.
    """
    for converter in table.converters:
        (pattern, *others) = converter.target_patterns
        operations = {type(operation).__name__ for operation in converter.operations}
        if others or not operations <= _STACKING or not target.endswith(pattern):
            continue
        before, sources = target.removesuffix(pattern), converter.source_patterns
        if all(source.count("*") == 1 for source in sources):
            return [[before + s.replace("*", f"{e}") for s in sources] for e in range(experts)]
    return []


@dataclass(slots=True)
class Sources:
    """Stored tensors of each parameter.

    Attributes
    ----------
    single : dict of str to str
        The tensor of each parameter or buffer, by name in memory.
    stacked : dict of str to list of list of str
        Of each fused parameter and each expert the tensors that lie one below the other.
    chunks : dict of str to Chunk
        Parameters that are rows of a tensor.
    computed : dict of str to str
        Parameters that transformers makes in any other way, and what it does; or of which tensors
        are missing.
    unused : list of str
        Tensors that no parameter takes.
    """

    single: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, list[list[str]]] = field(default_factory=dict)
    chunks: dict[str, Chunk] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


class Conversions(NamedTuple):
    """transformers' own table for a model: renamings, and converters by their pattern."""

    renamings: list[Any]
    converters: list[Any]
    by_pattern: dict[str, Any]
    base_model_prefix: str


def conversions_of(model: Any) -> Conversions:
    """Return the conversions that transformers applies when it loads a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return Conversions(
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        converters,
        {key: one for one in converters for key in one.source_patterns},
        model.base_model_prefix,
    )


def find_sources(model: Any, names: Iterable[str]) -> Sources:
    """Assign the tensors of a checkpoint, by name, to a transformers model's parameters."""
    from transformers.core_model_loading import rename_source_key

    table = conversions_of(model)
    wanted = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    sources = Sources()
    groups: dict[str, dict[str, list[str]]] = {}
    stacks: dict[str, tuple[str, str]] = {}
    for name in sorted(names, key=natural):
        # A converter takes any number of an expert: one look for all, of up to a hundred thousand.
        of_any = _EXPERT.sub(".experts.*.", name)
        target, pattern = stacks.get(of_any) or rename_source_key(
            name, table.renamings, table.converters, table.base_model_prefix, wanted
        )
        if pattern is not None and of_any != name:
            stacks[of_any] = target, pattern
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            sources.unused.append(name)
        elif pattern is None:
            sources.single[target] = name
        else:
            patterns = table.by_pattern[pattern].source_patterns
            group = groups.setdefault(target, {key: [] for key in patterns})
            group[pattern].append(name)
    for target, group in groups.items():
        _convert(sources, table.by_pattern[next(iter(group))], target, group)
    return sources


def _convert(sources: Sources, converter: Any, target: str, group: dict[str, list[str]]) -> None:
    operations = [type(operation).__name__ for operation in converter.operations]
    tensors = [name for names in group.values() for name in names]
    outputs = _outputs(converter, target)
    if operations == ["Chunk"] and len(tensors) == 1 and converter.operations[0].dim == 0:
        for number, output in enumerate(outputs):
            sources.chunks[output] = Chunk(tensors[0], number, len(outputs))
    elif not set(operations) <= _STACKING:
        sources.computed |= dict.fromkeys(outputs, ", ".join(sorted(set(operations) - _STACKING)))
    elif len({len(names) for names in group.values()}) != 1:
        sources.computed[target] = MISSING
    else:
        sources.stacked[target] = [list(names) for names in zip(*group.values(), strict=True)]


def _outputs(converter: Any, target: str) -> list[str]:
    """Return all parameters that a converter produces, starting with `target`."""
    first = converter.target_patterns[0]
    if len(converter.target_patterns) == 1 or first not in target:
        return [target]
    before, _, after = target.rpartition(first)
    return [f"{before}{pattern}{after}" for pattern in converter.target_patterns]
