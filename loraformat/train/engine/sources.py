"""Which tensors of a bundle each parameter of a model is made of.

transformers renames some tensors when it loads them and fuses the experts of a mixture into one
parameter; its own table of these conversions is asked, and of it only what keeps the tensors where
they are: renaming and stacking.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraformat.errors import UnsupportedError, printable
from loraformat.layout import natural

__all__ = ["Sources", "find_sources"]

_STACKING = {"MergeModulelist", "Concatenate"}


@dataclass(slots=True)
class Sources:
    """What parameters are made of.

    Attributes
    ----------
    single : dict of str to str
        The tensor of each parameter or buffer, by name in memory.
    stacked : dict of str to list of list of str
        Of each fused parameter and each expert the tensors that lie one below the other.
    unused : list of str
        Tensors that no parameter takes.
    """

    single: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, list[list[str]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def find_sources(model: Any, names: Iterable[str], path: object) -> Sources:
    """Assign the tensors of a bundle to a model's parameters.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    names : iterable of str
        Of all tensors.
    path : object
        For messages.

    Raises
    ------
    UnsupportedError
        If transformers would compute a parameter from several tensors in another way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {key: one for one in converters for key in one.source_patterns}
    wanted = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    sources = Sources()
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=natural):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            sources.unused.append(name)
        elif pattern is None:
            sources.single[target] = name
        else:
            _check_stacking(by_pattern[pattern], target, path)
            group = groups.setdefault(
                target, {key: [] for key in by_pattern[pattern].source_patterns}
            )
            group[pattern].append(name)
    for target, group in groups.items():
        sources.stacked[target] = _by_expert(target, group, path)
    return sources


def _check_stacking(converter: Any, target: str, path: object) -> None:
    operations = {type(operation).__name__ for operation in converter.operations}
    if not operations <= _STACKING:
        raise UnsupportedError(
            f"parameter {printable(target)} is made by {', '.join(sorted(operations - _STACKING))} "
            "when transformers loads it, which training on mapped weights does not know",
            path=f"{path}",
        )


def _by_expert(target: str, group: dict[str, list[str]], path: object) -> list[list[str]]:
    counts = {len(names) for names in group.values()}
    if len(counts) != 1:
        raise UnsupportedError(
            f"parameter {printable(target)} lacks tensors of some of its experts", path=f"{path}"
        )
    return [list(names) for names in zip(*group.values(), strict=True)]
