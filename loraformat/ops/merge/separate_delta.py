"""Lossless merge into a bundle: unchanged NF4 codes and one adapter.

What the output computes is base + Σ ωᵢ·Dᵢ, the sum held exactly by concatenated factors:
quantizing it again instead would lose nearly all of an ordinary delta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraformat.bundle.converter import CONVERTER
from loraformat.errors import UsageError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.tied_head import refuse_lost_head, settled
from loraformat.model.vocabulary import Resize, per_token
from loraformat.model.written import WrittenModel
from loraformat.ops.adapter_output.output import write_bundle
from loraformat.ops.combine.combine import CombineOptions, combine_adapters
from loraformat.ops.merge.plan import TensorEdit, plan_edits
from loraformat.ops.merge.tensor import MergedTensor
from loraformat.ops.merge.tokenizers import resized_base, tokens_without_rows
from loraformat.ops.model_output import ModelOutput
from loraformat.plugins import WriteOptions
from loraformat.storage.safe_paths import is_adapter_name

__all__ = ["SeparateDelta", "name_of"]


def name_of(adapters: Sequence[str | Path | Adapter], wanted: str | None) -> str:
    """Return the name of the adapter in the new bundle.

    That is the ``wanted`` one; by default the last part of an only adapter's path, and ``merged``
    for several.

    Raises
    ------
    UsageError
        If it cannot be the name of an adapter.

    Examples
    --------
    >>> name_of(["org/medical@main"], None), name_of(["a", "b"], None)
    ('medical', 'merged')
    """
    if wanted is None:
        first = adapters[0].path if isinstance(adapters[0], Adapter) else adapters[0]
        local = first if isinstance(first, Path) else Path(first)
        if not local.exists():
            local = Path(str(first).partition("@")[0])
        wanted = local.absolute().name if len(adapters) == 1 else "merged"
    if not is_adapter_name(wanted):
        raise UsageError(
            f"{printable(wanted)} cannot be the name of an adapter in a bundle",
            hint="choose one with --name",
        )
    return wanted


class SeparateDelta:
    """A merge whose output is a bundle with the base's codes and one adapter.

    Parameters
    ----------
    original : Checkpoint
        With NF4 weights.
    adapters : sequence of Adapter
        Opened against it.
    weights : sequence of float
        An only adapter of weight 1 is copied as it is.
    name : str
        Of the adapter in the bundle.

    Attributes
    ----------
    plan : MergePlan
    checkpoint : Checkpoint
        The base of the bundle.
    notes : list of str
        What a user should know.

    Raises
    ------
    UsageError
        If the base has no NF4 codes; both ways to an NF4 output are named.
    """

    def __init__(
        self,
        original: Checkpoint,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        name: str,
    ) -> None:
        if not original.nf4_weights:
            raise UsageError(
                f"{original.path} is dense, but a bundle stores NF4",
                hint="convert it to a bundle first and merge into that, which stores the adapter "
                "separately; or quantize the merged weights with --requantize",
            )
        refuse_lost_head(original)
        self.weights, self.name = weights, name
        self.adapters = adapters
        self.checkpoint, self.notes = settled(original)
        self.plan = plan_edits(self.checkpoint, adapters, weights)
        if self.plan.resize is not None:
            self.checkpoint, self.adapters, note = _with_vocabulary(
                self.checkpoint, adapters, self.plan.resize
            )
            self.notes = [*self.notes, note]
        else:
            self.notes = [*self.notes, *tokens_without_rows(self.checkpoint, adapters)]

    def write(
        self,
        target: Path,
        shard_limit: int,
        allow_base_mismatch: bool,
        force: bool,
        progress: Callable[[int, int], None],
    ) -> WrittenModel:
        """Write the bundle; an only adapter of weight 1 is copied as it is.

        Raises
        ------
        UnsupportedError
            If the weighted sum is no adapter: DoRA with a weight or beside another, for example.
        """
        only = self.adapters[0] if len(self.adapters) == 1 and self.weights[0] == 1 else None
        with ExitStack() as stack:
            combined = only
            if combined is None:
                exact = CombineOptions(method="cat")
                result, _ = combine_adapters(self.adapters, exact, weights=self.weights)
                combined = stack.enter_context(result)
            write = partial(
                write_bundle,
                adapters={self.name: combined},
                allow_base_mismatch=allow_base_mismatch,
            )
            output = stack.enter_context(
                ModelOutput(
                    target,
                    replace(CONVERTER, write=write),
                    inputs=[self.checkpoint, *self.adapters],
                    plan=["separate delta", self.name, list(self.weights), shard_limit],
                    force=force,
                    progress=progress,
                )
            )
            return output.write(self.checkpoint, WriteOptions(shard_limit))


def _with_vocabulary(
    original: Checkpoint, adapters: Sequence[Adapter], resize: Resize
) -> tuple[Checkpoint, list[Adapter], str]:
    """Return a base with the adapters' vocabulary, and the adapters for that base.

    Its embedding and head are resized as transformers does it, so that PEFT loads what lies beside
    them as it is. All other tensors stay.

    None of the adapters names the base by the fingerprint that it had.
    """
    tensors: dict[str, LazyTensor] = dict(original.tensors)
    for name, rows in per_token(original.tensors).items():
        if rows == resize.before:
            edit = TensorEdit(name, name, height=resize.after)
            tensors[name] = MergedTensor(edit, original.tensors[name]).dense()
    base, note = resized_base(original, resize, adapters, tensors)
    named = [replace(one, base_fingerprint=None, verbatim=False) if one.base_fingerprint else one
             for one in adapters]  # fmt: skip
    return base, named, note
