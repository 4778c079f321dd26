"""Weights that an adapter replaces: whole tensors, trained rows, another vocabulary.

They take the place of the base's own before the model is built, and are not trained: a branch
trains beside them as it does beside the base's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.tied_head import HEAD, untied_config
from loraformat.model.vocabulary import per_token, resized_config, tokenizer_files
from loraformat.ops.merge.plan import TensorEdit, plan_edits
from loraformat.ops.merge.tensor import MergedTensor

__all__ = ["ReplacedWeights", "replaced_weights_of"]


@dataclass(frozen=True, slots=True)
class ReplacedWeights:
    """What takes the place of a base's own.

    Attributes
    ----------
    adapter : Adapter
        That it comes from.
    tensors : dict of str to DenseTensor
        By name in the bundle; a head that is tied there is new.
    config : bytes or None
        ``config.json`` of the model with them.
    tokenizer : Path or None
        Directory of the tokenizer, where the vocabulary is another and has one.
    """

    adapter: Adapter
    tensors: dict[str, DenseTensor]
    config: bytes | None
    tokenizer: Path | None = None


def replaced_weights_of(adapter: Adapter, base: Checkpoint) -> ReplacedWeights | None:
    """Return the weights that an adapter replaces; None if it has only deltas.

    Tensors that the adapter replaces stay mapped; what is put together of two sources, an embedding
    with trained rows or more of them, is held in memory.

    Raises
    ------
    UnsupportedError
        If it does not fit the base.
    """
    known = per_token(base.tensors)
    # Of the deltas those of the embedding and the head, whose shapes have the number of tokens.
    deltas = {n: d for n, d in adapter.deltas.items() if n in known or n.endswith(HEAD)}
    if not (deltas or adapter.replacements or adapter.rows):
        return None
    plan = plan_edits(base, [replace(adapter, deltas=deltas)], [1.0])
    edits = {name: edit for name, edit in plan.edits.items() if not edit.only_deltas}
    if not edits:
        return None
    if plan.untied:
        edits |= {n: edit for n, edit in plan.edits.items() if n not in base.tensors}
    config = base.config
    if config is not None and plan.resize is not None:
        config = resized_config(config, plan.resize)
    if config is not None and plan.untied:
        config = untied_config(config)
    has_own = plan.resize is not None and bool(tokenizer_files(adapter.files))
    return ReplacedWeights(
        adapter,
        {name: _tensor(edit, adapter, base) for name, edit in edits.items()},
        config,
        adapter.path if has_own else None,
    )


def _tensor(edit: TensorEdit, adapter: Adapter, base: Checkpoint) -> DenseTensor:
    if edit.replacement is not None and not edit.rows:
        return replace(edit.replacement[1], name=edit.name)
    source = None if edit.source is None else base.tensors[edit.source]
    made = MergedTensor(replace(edit, terms=[]), source, [adapter], [1.0]).dense()
    data = made.load()
    return DenseTensor(made.name, made.dtype, made.shape, lambda: data)
