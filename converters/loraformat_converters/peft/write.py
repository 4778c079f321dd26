"""Writing a PEFT adapter in canonical form.

The scaling is folded into B, alpha equals the rank, rsLoRA is off. If all modules have one
rank there are no patterns; else rank and alpha patterns name each module in full.

Where the source is of another format and names one alpha, that and B are kept instead
(``keep_scaling``): then a round trip changes no bit.

Folding is done in float64 and rounded once. Unless a dtype is asked for, every tensor keeps
its own, and B changes to float32 only where folding would cost it bits: if it has 16 bits and
the scaling is neither 1 nor, for bfloat16 with its wide exponent, a power of two.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy

from loraformat.bundle.integrity import BASE_FINGERPRINT, BASE_SOURCE
from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import STATISTICS_NAME, Adapter, LoraDelta
from loraformat.model.architecture import module_of
from loraformat.model.checkpoint import DenseTensor
from loraformat.plugins import AdapterWriteOptions
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import write_all
from loraformat.tensors.arrays import array_bytes, array_view, finite, numpy_dtype
from loraformat.tensors.dtypes import ITEM_BYTES
from loraformat.tensors.header import Entry, encode_header
from loraformat_converters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES
from loraformat_converters.peft.experts import stacked
from loraformat_converters.peft.keys import PREFIX
from loraformat_converters.peft.moments import SUFFIX
from loraformat_converters.peft.refusals import INVOCATION
from loraformat_converters.peft.rows import FIELD, rows_config
from loraformat_converters.peft.weights import INDEX_NAME, PICKLE_NAME, WEIGHTS_NAME
from loraformat_converters.peft.wrapping import Wrapping

__all__ = ["write"]

#: Since this version experts are stored as they are written here.
_EXPERTS_SINCE = "0.19.0"


def write(adapter: Adapter, publication: AtomicOutput, options: AdapterWriteOptions) -> None:
    """Write an adapter into an output's work directory.

    All factors are rounded to ``options.dtype``, to nearest even; without it each keeps its own
    where that loses nothing. ``keep_scaling`` is heeded where one alpha says it all. What PEFT's
    files cannot hold is refused.
    """
    adapter = _as_spelled(adapter)
    alpha = _one_alpha(adapter) if options.keep_scaling else None
    wrapping = Wrapping(adapter, options.base)
    config = _encoded(adapter, alpha, wrapping)
    pieces = [
        piece
        for delta in adapter.deltas.values()
        for piece in _pieces(delta, options, wrapping, delta.scaling if alpha is None else 1.0)
    ]
    for name, tensor in adapter.replacements.items():
        pieces.append(_Piece(PREFIX + _inside_wrapper(name, adapter), tensor, tensor.dtype))
    for target, rows in adapter.rows.items():
        name = f"{PREFIX}{target.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"
        pieces.append(_Piece(name, rows.rows, options.dtype or rows.rows.dtype))
    known = {BASE_FINGERPRINT: adapter.base_fingerprint, BASE_SOURCE: adapter.base_source}
    metadata = {"format": "pt"} | {key: value for key, value in known.items() if value}
    _write_tensors(pieces, publication, WEIGHTS_NAME, metadata)
    moments = [
        _Piece(module_of(delta.target) + SUFFIX, delta.second_moment, "F32")
        for delta in adapter.deltas.values()
        if delta.second_moment is not None
    ]
    if moments:
        _write_tensors(moments, publication, STATISTICS_NAME, {"format": "pt"})
    for file in adapter.files:
        if not _is_ours(file.path):
            publication.write(file.path, file.read())
    publication.write(CONFIG_NAME, config)


def _inside_wrapper(name: str, adapter: Adapter) -> str:
    """Return PEFT's name of a replaced tensor, inside the wrapper of an adapted layer."""
    module, _, leaf = name.rpartition(".")
    if f"{module}.weight" in adapter.rows:
        return f"{module}.token_adapter.base_layer.{leaf}"
    if f"{module}.weight" in adapter.deltas:
        return f"{module}.base_layer.{leaf}"
    return name


def _one_alpha(adapter: Adapter) -> float | None:
    """Return the alpha that gives every scaling exactly; None if there is none."""
    deltas = adapter.deltas.values()
    alpha = next((delta.alpha for delta in deltas), None)
    same = all(d.alpha == alpha and alpha / d.rank == d.scaling for d in deltas)
    return alpha if same else None


def _as_spelled(adapter: Adapter) -> Adapter:
    """Return an adapter under its source's names."""
    own = adapter.spellings
    deltas = [replace(d, target=own.get(d.target, d.target)) for d in adapter.deltas.values()]
    rows = [replace(r, target=own.get(r.target, r.target)) for r in adapter.rows.values()]
    return replace(
        adapter,
        deltas={delta.target: delta for delta in deltas},
        replacements={own.get(name, name): t for name, t in adapter.replacements.items()},
        rows={row.target: row for row in rows},
    )


def _is_ours(path: str) -> bool:
    """Tell whether a file of the source is generated on writing."""
    shards = r"adapter_model-\d+-of-\d+\.safetensors"
    ours = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME, STATISTICS_NAME)
    return path in ours or bool(re.fullmatch(shards, path))


def _encoded(adapter: Adapter, alpha: float | None, wrapping: Wrapping) -> bytes:
    """Return the config's text; one longer than any reader of ours takes is refused."""
    text = json.dumps(_config(adapter, alpha, wrapping), indent=2, sort_keys=True) + "\n"
    if len(text) > MAX_CONFIG_BYTES:
        raise UnsupportedError(
            f"its config would be {len(text)} bytes long, wanted at most {MAX_CONFIG_BYTES}: too "
            "many modules of ranks of their own",
            path=adapter.path,
            hint="bring them to one rank with loraformat reduce --rank",
        )
    return text.encode("utf-8")


class _Piece(NamedTuple):
    """A tensor to write: file name, dtype, and the folded factor."""

    name: str
    tensor: DenseTensor
    dtype: str
    factor: float = 1.0


def _is_embedding(delta: LoraDelta) -> bool:
    return delta.orientation == "transposed" and bool(re.search(r"embed|wte|wpe", delta.target))


def _pieces(
    delta: LoraDelta, options: AdapterWriteOptions, wrapping: Wrapping, scaling: float
) -> Iterator[_Piece]:
    """Yield a delta's tensors, with the remaining scaling folded in."""
    stem, a, b = wrapping.stem_of(delta), delta.a, delta.b
    if len(a.shape) == 3:
        experts, rank, columns = a.shape
        a = stacked(a, (experts * rank, columns))
        b = stacked(b, b.shape, (1, 2, 0))
        b = stacked(b, (b.shape[0], rank * experts))
    names = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    if _is_embedding(delta):
        names = (f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B")
    yield _Piece(names[0], a, options.dtype or a.dtype)
    yield _Piece(names[1], b, options.dtype or _folded_dtype(b.dtype, scaling), scaling)
    if delta.bias is not None:
        own = options.dtype or _folded_dtype(delta.bias.dtype, scaling)
        yield _Piece(f"{stem}.lora_B.bias", delta.bias, own, scaling)
    if delta.magnitude is not None:
        own = options.dtype or delta.magnitude.dtype
        yield _Piece(f"{stem}.lora_magnitude_vector", delta.magnitude, own)


def _folded_dtype(dtype: str, scaling: float) -> str:
    """Return a dtype that stores a scaled tensor without losing bits."""
    exact = scaling == 1 or (dtype == "BF16" and abs(math.frexp(scaling)[0]) in (0.0, 0.5))
    return dtype if dtype in ("F32", "F64") or exact else "F32"


def _load(piece: _Piece) -> memoryview:
    tensor = piece.tensor
    data = tensor.load()
    if piece.factor == 1.0 and tensor.dtype == piece.dtype:
        return data
    values = array_view(data, tensor.dtype).astype(numpy.float64)
    with numpy.errstate(over="ignore", invalid="ignore"):
        rounded = (values * piece.factor).astype(numpy_dtype(piece.dtype))
    if not finite(rounded):
        raise UnsupportedError(
            f"tensor {printable(piece.name)} does not fit into {piece.dtype} with its scaling "
            f"{piece.factor:g}",
            hint="write it as f32 or bf16",
        )
    return array_bytes(rounded)


def _write_tensors(
    pieces: Iterable[_Piece], publication: AtomicOutput, name: str, metadata: dict[str, str]
) -> None:
    entries, position = [], 0
    for piece in pieces:
        nbytes = piece.tensor.count * ITEM_BYTES[piece.dtype]
        shape = piece.tensor.shape
        entries.append(Entry(piece.name, piece.dtype, shape, position, position + nbytes))
        position += nbytes
    with publication.create(name) as file:
        write_all(file, encode_header(entries, metadata))
        for piece in pieces:
            write_all(file, _load(piece))
            piece.tensor.release()


def _config(adapter: Adapter, alpha: float | None, wrapping: Wrapping) -> dict[str, Any]:
    """Return the config: the source's fields, updated from the deltas."""
    deltas = adapter.deltas.values()
    ranks = {wrapping.name_of(delta): delta.rank for delta in deltas}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    kept = {key: value for key, value in adapter.config.items() if key not in _DESCRIBES_TENSORS}
    config = {
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        **kept,
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "r": usual,
        "lora_alpha": usual if alpha is None else int(alpha) if alpha.is_integer() else alpha,
        "rank_pattern": others,
        "alpha_pattern": others if alpha is None else {},
        "use_rslora": False,
        "use_dora": any(delta.magnitude is not None for delta in deltas),
        "lora_bias": any(delta.bias is not None for delta in deltas),
        "fan_in_fan_out": any(
            delta.orientation == "transposed"
            and not _is_embedding(delta)
            and not wrapping.is_parameter(delta)
            for delta in deltas
        ),
        "target_modules": wrapping.target_modules(),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
        INVOCATION: list(adapter.invocation_tokens) or None,
        FIELD: rows_config(adapter.rows, adapter.config.get(FIELD)),
    }
    if wrapping.parameters:
        config |= {
            "target_parameters": wrapping.parameters,
            "peft_version": _EXPERTS_SINCE,
            "lora_dropout": 0.0,
        }
    return config


#: Fields of the source that described its tensors, or how they were trained.
_DESCRIBES_TENSORS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_version", "auto_mapping"),
    *("target_parameters", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "velora_config",
}
