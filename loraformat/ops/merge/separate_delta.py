"""Merging into a bundle without a loss: the NF4 codes as they are, one adapter beside them.

What the output computes is base + Σ ωᵢ·Dᵢ, the sum held exactly by concatenated factors:
quantizing it again instead would lose nearly all of an ordinary delta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraformat import plugins
from loraformat.errors import UsageError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint, LazyTensor, NF4Tensor
from loraformat.model.vocabulary import Resize, per_token
from loraformat.ops.merge.plan import TensorEdit
from loraformat.ops.merge.vocabulary import resized_base
from loraformat.ops.model_output import ModelOutput
from loraformat.plugins import WriteOptions
from loraformat.shards.write_directory import WrittenModel
from loraformat.storage.safe_paths import is_adapter_name

__all__ = ["check_beside", "merge_beside", "name_of", "with_vocabulary"]


def check_beside(original: Checkpoint, base: str | Path, target: str | Path) -> None:
    """Refuse a base without NF4 codes.

    Raises
    ------
    UsageError
        Naming both ways to an NF4 output.
    """
    if not any(isinstance(tensor, NF4Tensor) for tensor in original.tensors.values()):
        raise UsageError(
            f"{base} is dense, and a bundle stores NF4",
            hint="convert it to a bundle first, then merge into that: the adapter lies beside the "
            "codes; or merge it in and quantize the sum with --requantize",
        )


def name_of(adapters: Sequence[str | Path | Adapter], wanted: str | None) -> str:
    """Choose the name of the adapter in the new bundle.

    Parameters
    ----------
    adapters : sequence of str, Path or Adapter
        As the user gave them.
    wanted : str or None
        What the user asked for; by default the last part of an only adapter's path, and
        ``merged`` for several.

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


def with_vocabulary(
    original: Checkpoint, adapters: Sequence[Adapter], resize: Resize
) -> tuple[Checkpoint, list[Adapter], str]:
    """Return a base of the adapters' vocabulary, and the adapters as ones of that base.

    Its embedding and head are resized as transformers does it, so that PEFT loads what lies beside
    them as it is. All other tensors stay.

    Parameters
    ----------
    original : Checkpoint
    adapters : sequence of Adapter
    resize : Resize

    Returns
    -------
    Checkpoint
    list of Adapter
        None of them names the base by the fingerprint that it had.
    str
        What is to be said.
    """
    from loraformat.ops.merge.merged_tensor import merged_tensor

    tensors: dict[str, LazyTensor] = dict(original.tensors)
    for name, rows in per_token(original.tensors).items():
        if rows == resize.before:
            edit = TensorEdit(name, name, height=resize.after)
            tensors[name] = merged_tensor(edit, original.tensors[name], (), (), None)
    base, note = resized_base(original, resize, adapters, tensors)
    named = [replace(one, base_fingerprint=None, verbatim=False) if one.base_fingerprint else one
             for one in adapters]  # fmt: skip
    return base, named, note


def merge_beside(
    original: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    name: str,
    target: Path,
    *,
    shard_limit: int,
    allow_base_mismatch: bool,
    force: bool,
    progress: Callable[[int, int], None],
) -> WrittenModel:
    """Write a bundle with the base's codes byte for byte, and one adapter.

    Parameters
    ----------
    original : Checkpoint
        With NF4 weights.
    adapters, weights
        An only adapter of weight 1 is copied as it is.
    name : str
        Of the adapter in the bundle.
    target, shard_limit, allow_base_mismatch, force, progress
        As in `loraformat.ops.merge.merge.merge`.

    Raises
    ------
    UnsupportedError
        If the weighted sum is no adapter: DoRA with a weight or beside another, for example.
    """
    from loraformat.ops.adapter_output.in_bundle import write_bundle

    with ExitStack() as stack:
        only = adapters[0] if len(adapters) == 1 and weights[0] == 1 else None
        combined = only or _combined(stack, adapters, weights)
        write = partial(
            write_bundle, adapters={name: combined}, allow_base_mismatch=allow_base_mismatch
        )
        output = stack.enter_context(
            ModelOutput(
                target,
                plugins.get("loraformat"),
                inputs=[original, *adapters],
                plan=["separate delta", name, list(weights), shard_limit],
                force=force,
                progress=progress,
            )
        )
        return output.write(original, WriteOptions(shard_limit), write)


def _combined(stack: ExitStack, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    from loraformat.ops.combine.combine import CombineOptions, combine_adapters

    result, _ = combine_adapters(adapters, CombineOptions(method="cat"), weights=weights)
    return stack.enter_context(result)
