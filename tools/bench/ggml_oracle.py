"""ggml's own reference quantizers, by way of the library inside xllamacpp."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
from loraformat_converters.gguf.container.types import GGMLType


@cache
def _library() -> ctypes.CDLL:
    import xllamacpp

    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def quantize(values: np.ndarray, kind: GGMLType, importance: np.ndarray | None = None) -> bytes:
    """Return a matrix of float32 in any type that ggml quantizes to.

    Parameters
    ----------
    values : numpy.ndarray
    kind : GGMLType
    importance : numpy.ndarray, optional
        Of each column, as an imatrix says it; some types need it, and Q4_0 to Q5_1 search
        their scales with it only.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
    rows, length = values.reshape(-1, values.shape[-1]).shape
    out = np.empty(rows * kind.row_bytes(length), dtype=np.uint8)
    written = _library().ggml_quantize_chunk(
        int(kind), values.ctypes.data, out.ctypes.data, 0, rows, length,
        None if importance is None else importance.ctypes.data,
    )  # fmt: skip
    assert written == out.nbytes
    return out.tobytes()
