"""Model directories of safetensors whose weights are quantized, by any method.

The method (`loraformat.model.quantization_method`) says which stored tensors form a weight and
decodes rows of it; here the directory is recognised and opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraformat.errors import UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.packed_weights import ORIGINAL, Signature, packed_weights
from loraformat.model.quantization_method import QuantizationMethod
from loraformat.plugins import BaseFormat, ReadOptions
from loraformat.shards.read_directory import open_model, peek_config, stored_entries
from loraformat.storage.safe_paths import MANIFEST_NAME

__all__ = ["method_of", "quantized_format"]


def method_of(path: Path, more: Iterable[Signature] = ()) -> str | None:
    """Return the method that quantized the weights of a directory, or file, of safetensors.

    The stored tensors decide; the config is believed where they say nothing. `more` are signatures
    of methods that `packed_weights` does not know. None of dense weights, a bundle, and a model
    that cannot be opened: reading it will say what is wrong.
    """
    if (path / MANIFEST_NAME).is_file():
        return None
    if found := packed_weights(stored_entries(path), more):
        return found.method
    settings = peek_config(path).get("quantization_config")
    named = settings.get("quant_method") if isinstance(settings, dict) else None
    return named if isinstance(named, str) else None


def quantized_format(method: QuantizationMethod, summary: str) -> BaseFormat:
    """Return the record of a format that is a method, of its name in lower case.

    Its weights are decoded when they are loaded, or by rows, and rounded once, to nearest even, to
    `ReadOptions.dtype`, BF16 by default. Reading raises `InputError` if stored tensors do not fit
    each other, and `UnsupportedError` if other weights are quantized by another method.

    Parameters
    ----------
    method : QuantizationMethod
    summary : str
        One line for ``loraformat formats``.
    """
    signatures = [method.signature] if method.signature else []
    return BaseFormat(
        name=method.name.lower(),
        summary=summary,
        sniff=lambda path: method_of(path, signatures) == method.name,
        read=partial(_read, method),
        method=method,
    )


def _read(method: QuantizationMethod, path: Path, options: ReadOptions) -> Checkpoint:
    dtype = options.dtype or "BF16"
    stored = open_model(path, method.name.lower())
    try:
        weights = list(method.weights(stored))
        decoded = {weight.parts[0].name: weight.tensor(dtype) for weight in weights}
        parts = {part.name for weight in weights for part in weight.parts}
        tensors: dict[str, LazyTensor] = {}
        dropped = 0
        for name, tensor in stored.tensors.items():
            if name in decoded:
                tensors[decoded[name].name] = decoded[name]
            elif method.dropped is not None and method.dropped.search(name):
                dropped += 1
            elif name not in parts:
                tensors[name] = tensor
        if other := packed_weights(tensors):
            raise UnsupportedError(
                f"is quantized with {other.method} beside {method.name} "
                f"({printable(other.tensor)})",
                path=path,
                hint=ORIGINAL,
            )
    except BaseException:
        stored.close()
        raise
    left = [*stored.left_behind, *([f"{dropped} {method.dropped_what}"] if dropped else [])]
    return replace(stored, tensors=tensors, quantization_config=None, left_behind=tuple(left))
