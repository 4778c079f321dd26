"""A common dtype for the dense tensors of a quantized model.

GGUF files have norms, biases and routers in F32 beside weights of 16 bits, and some checkpoints
have so, too. A dense model is cast when it is opened. A quantized one is not: most classes then
multiply F32 by BF16 and stop. The type is that of most of the dense numbers, embedding and head;
what the others lose in it is measured, and of norms that were trained in 16 bits that is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy

from loraformat.families.table import family_of
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.config_json import parse, with_dtype
from loraformat.model.rows import RowReader
from loraformat.ops.encoding.encode import cast
from loraformat.plugins import BaseFormat
from loraformat.tensors.arrays import Array
from loraformat.tensors.dtypes import TORCH_NAMES, WEIGHT_DTYPES

__all__ = ["Alignment", "aligned", "with_decoded_dtype"]

_FLOATS = tuple(WEIGHT_DTYPES.values())
_SMALLEST = 1e-30
#: A block's scale, a float16, times a code, plus a minimum: of the plain types only this one
#: holds every such number exactly.
_EXACT = "F32"


@dataclass(slots=True)
class Alignment:
    """Result of casting tensors of other dtypes; known after loading.

    Attributes
    ----------
    dtype : str or None
        safetensors name of the type; None if nothing is to be said.
    names : list of str
    cast : bool
        False if they were left as they are.
    errors : list of float
        Largest relative error of a number, of each piece that was loaded.
    """

    dtype: str | None = None
    names: list[str] = field(default_factory=list)
    cast: bool = True
    errors: list[float] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return a note; empty if nothing was cast."""
        if not self.names:
            return []
        one = self.names[0]
        if not self.cast:
            return [
                f"{len(self.names)} dense tensors are not {self.dtype}, the type of most ({one}, "
                "...): if transformers cannot mix both, convert with --dtype"
            ]
        what = f"{len(self.names)} norms and other dense tensors ({one}, ...)"
        type_ = f"{self.dtype}, the type of most"
        if not self.errors:
            return [f"{what} become {type_}: transformers expects one dtype; --dtype f32 is exact"]
        lost = max(self.errors)
        cost = f"relative rounding error up to {lost:.2g} of a number" if lost else "without a loss"
        exact = "; --dtype f32 is exact" if lost else ""
        return [f"{what} became {type_}, {cost}: transformers expects one dtype{exact}"]


def aligned(model: Checkpoint) -> tuple[Checkpoint, Alignment]:
    """Cast the dense tensors of a quantized model to one dtype, if its class needs that.

    They are cast when they are loaded, and ``config.json`` names the type.
    """
    counts: dict[str, int] = {}
    for tensor in model.dense_tensors:
        if tensor.dtype in _FLOATS:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    if not model.nf4_weights or model.config is None or not counts:
        return model, Alignment()
    dtype = max(counts, key=lambda one: counts[one])
    one_type = family_of(parse(model.config)).one_type
    if one_type is False:
        return model, Alignment()
    others = [one for one in model.dense_tensors if one.dtype in _FLOATS and one.dtype != dtype]
    found = Alignment(dtype, [tensor.name for tensor in others], cast=bool(one_type))
    if not found.names or not found.cast:
        return model, found
    config = with_dtype(model.config, TORCH_NAMES[dtype])
    measured = {one.name: _measured(one, cast(one, dtype), found) for one in others}
    return replace(model, tensors={**model.tensors, **measured}, config=config), found


def _measured(before: DenseTensor, after: LazyTensor, found: Alignment) -> DenseTensor:
    def open_rows() -> RowReader:
        exact, rounded = before.row_reader(), after.row_reader()

        def read(start: int, stop: int) -> Array:
            result = rounded(start, stop)
            one, other = (x.astype(numpy.float64) for x in (exact(start, stop), result))
            error = numpy.abs(one - other) / numpy.maximum(numpy.abs(one), _SMALLEST)
            found.errors.append(float(error.max(initial=0.0)))
            return result

        return read

    return DenseTensor.by_rows(before.name, after.dtype, before.shape, open_rows, before.release)


def with_decoded_dtype(
    checkpoint: Checkpoint, writer: BaseFormat, dtype: str | None
) -> tuple[Checkpoint, list[str]]:
    """Set the dtype in ``config.json`` to the one in which decoded numbers are exact.

    Without that, transformers would round them as it opens them. With a ``dtype`` that the user
    asked for nothing changes. Returned with what a user should know.
    """
    if dtype is not None or writer.dtypes or writer.stores != "dense":
        return checkpoint, []
    decoded = [tensor for tensor in checkpoint.dense_tensors if tensor.quantization]
    if not decoded or any(tensor.dtype != _EXACT for tensor in decoded):
        return checkpoint, []
    config = checkpoint.config
    if config is not None:
        checkpoint = replace(checkpoint, config=with_dtype(config, TORCH_NAMES[_EXACT]))
    return checkpoint, [
        f"{len(decoded)} weights in block types were dequantized to f32, which is exact; half the "
        "size: --dtype f16 (error 0.02%) and --dtype bf16 (0.17%)"
    ]
