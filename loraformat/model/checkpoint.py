"""The format-independent checkpoint: lazy tensors, config, carried files.

A `Checkpoint` maps Hugging Face tensor names to *lazy* tensors. A tensor knows its
dtype and shape at once and its bytes only when `load` is called, so a checkpoint of
any size costs nothing until a writer walks over it, one tensor at a time. What a
tensor's ``load`` does (look at mapped bytes, cast, quantize, dequantize) is nobody
else's business: conversions are functions from lazy tensors to lazy tensors, see
`loraformat.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy

from loraformat.model.nf4_parts import NF4_PARTS, SEGMENT_PARTS, NF4Parts, Part
from loraformat.model.quantization_history import Quantized
from loraformat.model.rows import Elements, RowReader, RowSource, matrix_shape
from loraformat.nf4 import codec
from loraformat.nf4.quant_state import NESTED_BLOCK_SIZE, QuantState, parse_quant_state
from loraformat.nf4.rows import dequantize_rows
from loraformat.nf4.segments import NF4Stack, rows_of_segments
from loraformat.tensors.arrays import Array, array_view, numpy_dtype
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["CarriedFile", "Checkpoint", "DenseTensor", "LazyTensor", "NF4Tensor", "Provenance"]


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What a lazy tensor is without its numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns: all dimensions but the last make rows; a vector is one row."""
        return matrix_shape(self.shape)

    @property
    def quantization(self) -> str | None:
        """Type of the codes that it is decoded from; None for plain numbers."""
        return None

    @property
    def stored_as(self) -> str:
        """Type of its numbers where they are stored."""
        return self.quantization or self.dtype


@dataclass(frozen=True, slots=True)
class DenseTensor(_Tensor):
    """A tensor of ordinary numbers.

    Attributes
    ----------
    name, dtype, shape
        dtype is a safetensors name.
    load : callable
        Returns the tensor's bytes, row-major and little-endian, as a flat memoryview of
        ``nbytes`` bytes: mapped if they are stored so, computed otherwise; a `RowSource` if some
        rows can be computed without the others.
    release : callable
        Tells the source that the loaded bytes are no longer needed.
    stored : tuple of str and int, or None
        If it is computed from numbers of a type that safetensors has no name for: what its
        source calls that type, and how many bytes they take there.
    """

    load: Callable[[], memoryview] = field(repr=False)
    release: Callable[[], None] = field(default=_nothing, repr=False)
    stored: tuple[str, int] | None = None

    @classmethod
    def by_rows(
        cls,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        open_rows: Callable[[], RowReader],
        release: Callable[[], None] = _nothing,
        stored: tuple[str, int] | None = None,
    ) -> DenseTensor:
        """Return a tensor that is computed by rows, when it is loaded or asked for some.

        Parameters
        ----------
        name, dtype, shape, release, stored
            See the attributes.
        open_rows : callable
            See `RowSource`.

        Examples
        --------
        >>> import numpy
        >>> ones = lambda start, stop: numpy.ones((stop - start, 3))
        >>> tensor = DenseTensor.by_rows("w", "F16", (2, 3), lambda: ones)
        >>> tensor.rows(1, 2), len(tensor.load())
        (array([[1., 1., 1.]], dtype=float16), 12)
        """
        return cls(name, dtype, shape, RowSource(dtype, shape, open_rows), release, stored)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def quantization(self) -> str | None:
        """Type of the codes that it is decoded from; None for plain numbers."""
        return None if self.stored is None else self.stored[0]

    @property
    def stored_bytes(self) -> int:
        """Size where it is stored."""
        return self.nbytes if self.stored is None else self.stored[1]

    def array(self) -> Array:
        """Return the tensor for reading; it shares the loaded bytes (zero-copy if mapped)."""
        return array_view(self.load(), self.dtype, self.shape)

    def row_reader(self) -> RowReader:
        """Return `rows` for reading many times: what all rows need is made, or loaded, once."""
        if isinstance(self.load, RowSource):
            return self.load.reader()
        matrix = self.array().reshape(self.matrix_shape)
        return lambda start, stop: matrix[start:stop]

    def rows(self, start: int, stop: int) -> Array:
        """Return some rows of the tensor as a matrix, for reading.

        Parameters
        ----------
        start, stop : int
            Of the rows of a matrix of `matrix_shape`: a stack of experts (experts, out, in) is
            one of experts * out rows.

        Returns
        -------
        array
            (stop - start, columns), of the tensor's dtype; a view of mapped bytes if they are
            stored so. Of a tensor that is computed, only these rows are, where that is possible.
        """
        return self.row_reader()(start, stop)

    def elements(self) -> Array | Elements:
        """Return the numbers in row-major order; what is computed by rows, slice by slice."""
        if isinstance(self.load, RowSource):
            columns = self.matrix_shape[1]
            return Elements(self.row_reader(), columns, self.count, numpy_dtype(self.dtype))
        return self.array().reshape(-1)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in order: all at once, or a few megabytes if computed by rows."""
        yield from self.load.chunks() if isinstance(self.load, RowSource) else [self.load()]


@dataclass(frozen=True, slots=True)
class NF4Tensor(_Tensor):
    """A weight in NF4.

    Attributes
    ----------
    name : str
    dtype : str
        Type of the original and of the dequantized weight.
    shape : tuple of int
        As in the Hugging Face model.
    block_size : int
        Elements per scale.
    double_quant : bool
    transposed : bool
        The codes run over the transpose of the weight: bitsandbytes turns ``Conv1D``
        weights (GPT-2) into linears before it quantizes them.
    segments : int or None
        Equal runs of whole rows that are quantized each by itself, such as the matrices of a
        stack of experts; None if the codes run over the weight as one.
    load : callable
        Returns `NF4Parts`: mapped, or quantized now.
    release : callable
        As in `DenseTensor`.
    """

    block_size: int
    double_quant: bool
    transposed: bool
    load: Callable[[], NF4Parts] = field(repr=False)
    release: Callable[[], None] = field(default=_nothing, repr=False)
    segments: int | None = None

    @property
    def segment_count(self) -> int:
        """Elements of each segment; all of them if there are none."""
        return self.count // (self.segments or 1)

    @property
    def quantization(self) -> str:
        """Type of the codes that it is stored in: NF4."""
        return "NF4"

    @property
    def stored_bytes(self) -> int:
        """Size where it is stored."""
        return self.nbytes

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape that the codes run over."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def blocks(self) -> int:
        """Number of scales of each segment."""
        return -(-self.segment_count // self.block_size)

    def parts(self, quant_state_bytes: int) -> list[Part]:
        """List the stored tensors of this weight, in hashing order.

        Parameters
        ----------
        quant_state_bytes : int
            Length of the JSON text, which is known only once the weight is quantized.
        """
        scale_type = "U8" if self.double_quant else "F32"
        packed, cut = (
            (self.segment_count + 1) // 2,
            () if self.segments is None else (self.segments,),
        )
        parts = [
            Part("", "U8", (*cut, packed) if cut else (packed, 1)),
            Part(NF4_PARTS["absmax"], scale_type, (*cut, self.blocks)),
        ]
        if self.double_quant:
            nested = -(-self.blocks // NESTED_BLOCK_SIZE)
            parts.append(Part(NF4_PARTS["nested_absmax"], "F32", (*cut, nested)))
        parts.append(Part(NF4_PARTS["quant_map"], "F32", (16,)))
        if self.double_quant:
            parts.append(Part(NF4_PARTS["nested_quant_map"], "F32", (256,)))
        parts.append(Part(NF4_PARTS["quant_state"], "U8", (quant_state_bytes,)))
        if self.double_quant and cut:
            parts.append(Part(SEGMENT_PARTS["nested_offset"], "F32", cut))
        return parts

    @property
    def nbytes(self) -> int:
        """Size in bytes of codes and scales, without the constant maps and the JSON."""
        return sum(part.nbytes for part in self.parts(0) if "map" not in part.suffix)

    def state(self, nested_offset: float | None) -> QuantState:
        """Return the quant state for this weight; with segments, the offset is not in it."""
        return QuantState(
            self.stored_shape,
            self.dtype,
            self.block_size,
            None if self.segments else nested_offset,
            self.double_quant,
            self.segments,
        )

    def dequantize(self, dtype: str | None = None, out: Array | None = None) -> Array:
        """Return the weight as dense numbers, as bitsandbytes would.

        Parameters
        ----------
        dtype : str, optional
            safetensors name, F32, F16 or BF16; the weight's own by default. Each value is
            computed in float32 and rounded once, to nearest even.
        out : array, optional
            Flat buffer of ``count`` elements to fill.

        Returns
        -------
        array
            Of shape ``shape``; a view on the buffer, transposed if the codes are.
        """
        if out is None:
            out = numpy.empty(self.count, numpy_dtype(dtype or self.dtype))
        for number, codes in enumerate(self.segment_codes(self.load())):
            start = number * codes.count
            codec.dequantize(codes, out=out[start : start + codes.count])
        weight = out.reshape(self.stored_shape)
        return weight.T if self.transposed else weight

    def array(self) -> Array:
        """Return the weight as dense numbers of its own dtype."""
        return self.dequantize()

    def row_reader(self, dtype: str | None = None) -> RowReader:
        """Return `rows` for reading many times: codes are loaded, and scales decoded, once."""
        segments, wanted = self.segment_codes(self.load()), numpy_dtype(dtype or self.dtype)
        if self.segments is not None:
            return rows_of_segments(segments, self.matrix_shape[1], wanted)
        (codes,) = segments
        height, columns = self.matrix_shape
        scales = codes.scales()

        def read(start: int, stop: int) -> Array:
            if self.transposed:  # the rows are columns of what the codes run over
                turned = numpy.empty((columns, stop - start), wanted)
                return dequantize_rows(codes, turned, start=start, stride=height).T
            return codec.dequantize(
                codes, dtype=wanted, start=start * columns, stop=stop * columns, scales=scales
            ).reshape(stop - start, columns)

        return read

    def rows(self, start: int, stop: int, dtype: str | None = None) -> Array:
        """Return some rows of the weight as a matrix of dense numbers; no other is decoded.

        Parameters
        ----------
        start, stop : int
            As in `DenseTensor.rows`.
        dtype : str, optional
            As in `dequantize`.

        Returns
        -------
        array
            (stop - start, columns).
        """
        return self.row_reader(dtype)(start, stop)

    def segment_codes(self, parts: NF4Parts) -> list[codec.NF4]:
        """Return loaded parts as records of the codec: one for each segment, or one."""

        def rows(view: memoryview, dtype: str) -> Array:
            return array_view(view, dtype).reshape(self.segments or 1, -1)

        nested, offset = parts.nested_absmax, None
        if parts.nested_offset is not None:
            offset = array_view(parts.nested_offset, "F32")
        elif nested is not None:
            state = parse_quant_state(parts.quant_state, self.name, "")
            offset = numpy.array([state.nested_offset], numpy.float32)
        return NF4Stack(
            rows(parts.packed, "U8"),
            rows(parts.absmax, "U8" if self.double_quant else "F32"),
            self.segment_count,
            self.block_size,
            None if nested is None else rows(nested, "F32"),
            offset,
        ).segments()


LazyTensor = DenseTensor | NF4Tensor


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A file that travels with the weights unchanged: tokenizer, licence, card.

    Attributes
    ----------
    path : str
        Relative to the model's directory, with ``/``.
    nbytes : int
    read : callable
        Returns the file's bytes.
    """

    path: str
    nbytes: int
    read: Callable[[], bytes] = field(repr=False)

    @classmethod
    def of(cls, path: str, data: bytes) -> CarriedFile:
        """Return a file whose bytes are in memory."""
        return cls(path, len(data), lambda: data)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a checkpoint came from.

    Attributes
    ----------
    format : str
        Name of the converter that read it.
    repo, revision : str or None
        Hub id and commit, if it came from a Hub.
    fingerprint : str or None
        Of the bundle that it says it was made of, if it is none itself.
    quantized : tuple of Quantized
        How its numbers were quantized before they got the form that they have here.
    """

    format: str
    repo: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    quantized: tuple[Quantized, ...] = ()

    def to_json(self) -> dict[str, str]:
        """Return the members that are known."""
        fields = {"format": self.format, "repo": self.repo, "revision": self.revision}
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(slots=True)
class Checkpoint:
    """A model's weights and everything that travels with them.

    Attributes
    ----------
    path : Path
        The directory or file it was read from.
    provenance : Provenance
    tensors : mapping of str to LazyTensor
    config : bytes or None
        ``config.json`` without ``quantization_config``.
    quantization_config : dict or None
        What ``config.json`` said about quantization: bitsandbytes' own members.
    files : sequence of CarriedFile
        Everything else, without ``config.json``.
    sources : tuple of Path
        Every file that is read, to refuse an output that would overwrite one.
    left_behind : sequence of str
        What the source holds and a checkpoint cannot carry, as sentences for the report.
    close : callable
        Unmaps the files; raises `FileChangedError` if one changed meanwhile.
    """

    path: Path
    provenance: Provenance
    tensors: Mapping[str, LazyTensor]
    config: bytes | None = None
    quantization_config: dict[str, Any] | None = None
    files: Sequence[CarriedFile] = ()
    sources: tuple[Path, ...] = ()
    left_behind: Sequence[str] = ()
    close: Callable[[], None] = _nothing

    @property
    def nf4_weights(self) -> list[NF4Tensor]:
        """The weights in NF4."""
        return [tensor for tensor in self.tensors.values() if isinstance(tensor, NF4Tensor)]

    @property
    def dense_tensors(self) -> list[DenseTensor]:
        """The tensors of ordinary numbers."""
        return [tensor for tensor in self.tensors.values() if isinstance(tensor, DenseTensor)]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
