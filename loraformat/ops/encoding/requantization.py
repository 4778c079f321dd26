"""Notes about requantized weights.

Nobody can measure what the first time has lost: the original is not at hand. A report says so,
and calls its errors what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt

from loraformat.model.checkpoint import Checkpoint, LazyTensor, NF4Tensor
from loraformat.model.quantization_history import Quantized, spelled
from loraformat.model.written import TensorRecord
from loraformat.plugins import BaseFormat

__all__ = ["again_as", "history", "original_of", "requantization_notes", "rms", "with_history"]

_PLAIN = ("f32", "f16", "bf16")
#: A relative error below which a second rounding has found the numbers of the first.
_NONE = 1e-4


def history(checkpoint: Checkpoint) -> tuple[Quantized, ...]:
    """Return how the numbers of an open model were quantized, their present form included."""
    tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.quantization]
    return (*checkpoint.provenance.quantized, *_step(tensors))


def with_history(checkpoint: Checkpoint, *, codes_kept: bool) -> Checkpoint:
    """Return a model with its quantization history attached for the writer.

    If NF4 codes are kept, they are the present form, and not told.
    """
    steps = history(checkpoint)
    if codes_kept:
        decoded = [tensor for tensor in checkpoint.dense_tensors if tensor.quantization]
        steps = (*checkpoint.provenance.quantized, *_step(decoded))
    origin = replace(checkpoint.provenance, quantized=steps)
    return replace(checkpoint, provenance=origin)


def again_as(
    original: Checkpoint, written: Mapping[str, LazyTensor], writer: BaseFormat, dtype: str | None
) -> dict[str, str]:
    """Return the requantized weights and their new type.

    They are compared as they were read and as they are handed to the writer; ``dtype`` is what the
    user asked for.
    """
    before = bool(original.provenance.quantized)
    asked = dtype if writer.dtypes and dtype not in (None, *_PLAIN) else None
    found = {}
    for name, tensor in written.items():
        source = original.tensors.get(name)
        if source is None or not (before or source.quantization):
            continue
        if isinstance(tensor, NF4Tensor) and not isinstance(source, NF4Tensor):
            found[name] = tensor.quantization
        elif asked is not None and len(source.shape) > 1:
            found[name] = asked.upper()
    return found


def requantization_notes(
    steps: Iterable[Quantized],
    again: Mapping[str, str],
    records: Mapping[str, TensorRecord] | None = None,
    original: str | None = None,
) -> list[str]:
    """Return a note on requantization and its added error; none if no weight is changed by it.

    Parameters
    ----------
    steps : iterable of Quantized
        How they were quantized before.
    again : mapping of str to str
        From `again_as`.
    records : mapping of str to TensorRecord, optional
        What was written, with errors; none of a dry run.
    original : str, optional
        Where the weights are as they were first, if that is known.
    """
    if not again:
        return []
    said = f"already quantized: the source's weights were {spelled(steps)}"
    now = " and ".join(sorted(set(again.values())))
    start = "Use the original weights" + (f", {original}" if original else " if possible")
    if records is None:
        return [f"{said}; {now} quantizes them again. {start}"]
    written = [records[name] for name in again if name in records]
    error = rms(
        (r.relative_rms_error, prod(r.shape)) for r in written if r.relative_rms_error is not None
    )
    if error < _NONE:
        return []
    return [
        f"{said}; {now} adds an error of {error:.1%} (relative RMS, against the quantized source, "
        f"not the original). {start}"
    ]


def original_of(checkpoint: Checkpoint) -> str | None:
    """Return the Hub id of the weights that a bundle was quantized from, if known.

    A bundle that was made of quantized weights names those.
    """
    origin = checkpoint.provenance
    known = origin.format == "loraformat" and not origin.quantized
    return origin.repo if known else None


def rms(errors: Iterable[tuple[float, int]]) -> float:
    """Return the root of the mean square of errors, weighted by elements; 0 of none.

    Examples
    --------
    >>> rms([(1.0, 64), (7.0, 64)])
    5.0
    """
    known = list(errors)
    count = sum(elements for _, elements in known)
    return sqrt(sum(elements * error**2 for error, elements in known) / max(count, 1))


def _step(tensors: Sequence[LazyTensor]) -> tuple[Quantized, ...]:
    if not tensors:
        return ()
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.stored_as] = types.get(tensor.stored_as, 0) + 1
    stored = sum(tensor.stored_bytes for tensor in tensors)
    bits = 8 * stored / max(sum(tensor.count for tensor in tensors), 1)
    ordered = dict(sorted(types.items(), key=lambda item: -item[1]))
    return (Quantized(ordered, round(bits, 4)),)
