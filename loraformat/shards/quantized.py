"""Model directories of safetensors whose weights are quantized, by any method.

The method (`loraformat.model.quantization_method`) says which stored tensors form a weight and
decodes rows of it; here the directory is recognised and opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from loraformat.errors import UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.packed_weights import ORIGINAL, Signature, packed_weights
from loraformat.model.quantization_method import QuantizationMethod
from loraformat.shards.read_directory import open_model, peek_config, stored_entries
from loraformat.storage.reserved_names import MANIFEST_NAME

__all__ = ["is_quantized", "method_of", "read_quantized"]


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


def is_quantized(method: QuantizationMethod, path: Path) -> bool:
    """Tell whether the weights of a model are quantized by a method."""
    return method_of(path, filter(None, [method.signature])) == method.name


def read_quantized(method: QuantizationMethod, path: Path, dtype: str | None = None) -> Checkpoint:
    """Open a checkpoint: its weights are decoded when they are loaded, or by rows.

    Parameters
    ----------
    method : QuantizationMethod
    path : Path
    dtype : str, optional
        safetensors name of the type to which decoded weights are rounded, once, to nearest even;
        BF16 by default.

    Raises
    ------
    InputError
        If stored tensors do not fit each other.
    UnsupportedError
        If other weights are quantized by another method.
    """
    stored = open_model(path, method.name.lower())
    try:
        weights = list(method.weights(stored))
        decoded = {weight.parts[0].name: weight.tensor(dtype or "BF16") for weight in weights}
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
