"""Quantization methods: which stored tensors form a weight, and how its rows are decoded.

A method is one record and, with its functions, one short file. A model directory of any method is
read by `loraformat.shards.quantized`, through a converter that names the method;
``converters/README.md`` shows one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from re import Pattern

from loraformat.errors import InputError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.packed_weights import Signature
from loraformat.tensors.arrays import Array

__all__ = ["DAMAGED", "QuantizationMethod", "QuantizedWeight", "stored_part"]

#: What helps where stored tensors do not fit each other.
DAMAGED = "download the checkpoint again, with the config.json that belongs to it"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight, and the stored tensors that it is decoded from.

    Attributes
    ----------
    name : str
        As in the Hugging Face model.
    shape : tuple of int
    parts : tuple of DenseTensor
        The stored tensors, its codes first.
    stored_as : str
        Type of the codes, as reports spell it.
    rows : callable
        Of (start, stop): decodes these rows, float32 (stop - start, columns). All dimensions but
        the last make rows, so that a stack of experts (experts, out, in) has experts * out.
    dtype : str
        safetensors name of the type to which it is rounded if none is asked for.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[DenseTensor, ...]
    stored_as: str
    rows: Callable[[int, int], Array]
    dtype: str = "BF16"

    def tensor(self, dtype: str | None) -> DenseTensor:
        """Return the weight as a tensor of a dtype, decoded when it is loaded, or by rows."""

        def release() -> None:
            for part in self.parts:
                part.release()

        stored = self.stored_as, sum(part.nbytes for part in self.parts)
        return DenseTensor.by_rows(
            self.name, dtype or self.dtype, self.shape, lambda: self.rows, release, stored
        )


@dataclass(frozen=True, slots=True)
class QuantizationMethod:
    """How a method stores weights.

    Attributes
    ----------
    name : str
        As `loraformat.model.packed_weights` detects it, or that of the signature. Its converter
        has the same name, in lower case.
    weights : callable
        Returns the weights of a checkpoint of stored tensors; raises `InputError` where parts do
        not fit each other. It reads no numbers but sizes.
    signature : Signature or None
        How it is detected, if `packed_weights` does not know it.
    dropped : re.Pattern or None
        Names of tensors that weights do not need.
    dropped_what : str
        What those are, for the report: "scales of activations".
    """

    name: str
    weights: Callable[[Checkpoint], Iterable[QuantizedWeight]]
    signature: Signature | None = None
    dropped: Pattern[str] | None = None
    dropped_what: str = ""


def stored_part(
    stored: Checkpoint, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None
) -> DenseTensor:
    """Return a stored tensor that a weight needs.

    Parameters
    ----------
    stored : Checkpoint
    name : str
    dtypes : iterable of str
        safetensors names, of which it has one.
    shape : tuple of int, optional
        Its shape, if only one is right.

    Raises
    ------
    InputError
        If it is missing, or of another type or shape.
    """
    found, wanted = stored.tensors.get(name), tuple(dtypes)
    if found is None:
        problem = "is missing"
    elif isinstance(found, DenseTensor) and found.dtype in wanted and shape in (None, found.shape):
        return found
    else:
        problem = f"is {found.stored_as} {list(found.shape)}, wanted {' or '.join(wanted)}"
        problem += "" if shape is None else f" {list(shape)}"
    raise InputError(f"tensor {printable(name)} {problem}", path=stored.path, hint=DAMAGED)
