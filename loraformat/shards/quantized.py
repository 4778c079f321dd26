"""Model directories of safetensors whose weights are quantized, by any method.

The method (`loraformat.model.quantization_method`) says which stored tensors form a weight and
decodes rows of it; here the directory is recognised and opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model import config_json
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.packed_weights import ORIGINAL, Signature, packed_weights
from loraformat.model.quantization_method import QuantizationMethod
from loraformat.plugins import BaseFormat, ReadOptions
from loraformat.shards.read_directory import open_model, peek_config, stored_entries
from loraformat.storage.foreign_json import parse_object
from loraformat.storage.safe_paths import MANIFEST_NAME

__all__ = ["method_of", "quantized_format"]

#: Files of the programs that quantize, which would mislead readers of dense weights.
_SETTINGS = (
    "quantize_config.json", "quant_config.json", "quantization_config.json",
    "hf_quant_config.json",
)  # fmt: skip


def method_of(path: Path, more: Iterable[Signature] = ()) -> str | None:
    """Return the method that quantized the weights of a directory, or file, of safetensors.

    The stored tensors decide; the config is believed where they say nothing. `more` are signatures
    of methods that `packed_weights` does not know. None of dense weights, a bundle, and a model
    that cannot be opened: reading it will say what is wrong.
    """
    return _method_of(path, tuple(more), _state(path))


#: Every converter asks, to recognise its format: headers of large models are parsed once for all.
@lru_cache(maxsize=8)
def _method_of(path: Path, more: tuple[Signature, ...], state: object) -> str | None:
    """Return what `method_of` does, as long as the files stay in a state."""
    if (path / MANIFEST_NAME).is_file():
        return None
    named = (config_json.quantization(peek_config(path)) or {}).get("quant_method")
    if found := packed_weights(stored_entries(path), more, named):
        return found.method
    return named if isinstance(named, str) else None


def _state(path: Path) -> object:
    """Return what changes when a file of a directory does, or a file alone."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        facts = [(file.name, file.stat()) for file in files]
    except OSError:
        return object()  # equal to none: what cannot be asked is not remembered
    return tuple((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in facts)


def quantized_format(method: QuantizationMethod, summary: str) -> BaseFormat:
    """Return the record of a format that is a method, of its name in lower case.

    Its weights are decoded when they are loaded, or by rows, and rounded once, to nearest even, to
    `ReadOptions.dtype`, each weight's own by default. Reading raises `InputError` if stored tensors
    do not fit each other, and `UnsupportedError` if there are no such weights, or others are
    quantized by another method or in a way that is not known.

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
    stored = open_model(path, method.name.lower())
    try:
        _read_settings(stored)
        weights = list(method.weights(stored))
        if not weights:
            raise UnsupportedError(
                f"is quantized with {method.name}, by its config or --from, but it holds no such "
                "weights",
                path=path,
                hint="if its weights are dense, remove quantization_config from config.json",
            )
        parts = {part.name for weight in weights for part in weight.parts}
        decoded: dict[str, list[LazyTensor]] = {}  # by codes: a stack of experts may be many
        for weight in weights:
            decoded.setdefault(weight.parts[0].name, []).append(weight.tensor(options.dtype))
        tensors: dict[str, LazyTensor] = {}
        dropped = 0
        for name, tensor in stored.tensors.items():
            if name in decoded:
                tensors |= {weight.name: weight for weight in decoded[name]}
            elif method.dropped is not None and method.dropped.search(name):
                dropped += 1
            elif name not in parts:
                tensors[name] = tensor
        _check_rest(stored, method, decoded, tensors)
    except BaseException:
        stored.close()
        raise
    files = [file for file in stored.files if file.path not in _SETTINGS]
    left = [f"{file.path} (how it was quantized)" for file in stored.files if file not in files]
    left += [*stored.left_behind, *([f"{dropped} {method.dropped_what}"] if dropped else [])]
    return replace(
        stored, tensors=tensors, files=files, quantization_config=None, left_behind=tuple(left)
    )


def _read_settings(stored: Checkpoint) -> None:
    """Take what the config does not say from a file of the program that quantized."""
    for file in stored.files if stored.quantization_config is None else ():
        if file.path in _SETTINGS and file.nbytes <= config_json.MAX_CONFIG_BYTES:
            stored.quantization_config = parse_object(file.read(), stored.path / file.path)


def _check_rest(
    stored: Checkpoint,
    method: QuantizationMethod,
    decoded: Mapping[str, Sequence[LazyTensor]],
    tensors: Mapping[str, LazyTensor],
) -> None:
    """Refuse what cannot be left beside decoded weights.

    Raises
    ------
    InputError
        If a weight is stored in two forms.
    UnsupportedError
        If another method quantized some, or one needs tensors that the method does not know.
    """
    if other := packed_weights(tensors):
        raise UnsupportedError(
            f"is quantized with {other.method} beside {method.name} ({printable(other.tensor)})",
            path=stored.path,
            hint=ORIGINAL,
        )
    for part, weight in ((part, weight) for part, found in decoded.items() for weight in found):
        if part != weight.name and weight.name in stored.tensors:
            raise InputError(
                f"holds one weight twice, as {printable(weight.name)} and {printable(part)}",
                path=stored.path,
                hint=ORIGINAL,
            )
    owners = {weight.name.removesuffix("weight") for found in decoded.values() for weight in found}
    for name in tensors:
        above = [name[: dot + 1] for dot, sign in enumerate(name) if sign == "."]
        last = name.rpartition(".")[2]
        if not owners.isdisjoint(above) and last != "weight" and "bias" not in last:
            raise UnsupportedError(
                f"tensor {printable(name)} belongs to a quantized weight and is not understood",
                path=stored.path,
                hint=ORIGINAL,
            )
