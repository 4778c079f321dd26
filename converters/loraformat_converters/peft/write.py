"""Writing a PEFT adapter in its canonical form: right in PEFT and in every other runtime.

The scaling is folded into B, alpha equals the rank, rsLoRA is off. If all modules have one
rank there are no patterns; else rank and alpha patterns name each module in full.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from loraformat.adapter import Adapter, LoraDelta
from loraformat.checkpoint import DenseTensor, tensor_view
from loraformat.dtypes import ITEM_BYTES, torch_dtype
from loraformat.errors import UnsupportedError
from loraformat.header import Entry, encode_header
from loraformat.integrity import BASE_FINGERPRINT, BASE_SOURCE
from loraformat.plugins import AdapterWriteOptions
from loraformat.publish import Publication
from loraformat_converters.peft.config import CONFIG_NAME
from loraformat_converters.peft.keys import PREFIX
from loraformat_converters.peft.read import WEIGHTS_NAME

__all__ = ["write_adapter"]


def write_adapter(adapter: Adapter, publication: Publication, options: AdapterWriteOptions) -> None:
    """Write an adapter into a publication's work directory.

    Parameters
    ----------
    adapter : Adapter
    publication : Publication
    options : AdapterWriteOptions

    Raises
    ------
    UnsupportedError
        For what PEFT's files cannot hold (rows that are replaced, experts).
    """
    dtype = options.dtype or "F32"
    if adapter.rows or any(len(delta.a.shape) != 2 for delta in adapter.deltas.values()):
        raise UnsupportedError(
            "replaced rows and experts cannot be written as a PEFT adapter yet", path=adapter.path
        )
    pieces = [piece for delta in adapter.deltas.values() for piece in _pieces(delta, dtype)]
    for name, tensor in adapter.replacements.items():
        # A weight that is replaced and then changed lies inside PEFT's wrapper.
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.base_layer.{leaf}" if name in adapter.deltas else name
        pieces.append((PREFIX + inner, tensor, 1.0))
    _write_tensors(pieces, adapter, publication)
    config = json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n"
    for file in adapter.files:
        if file.path not in (CONFIG_NAME, WEIGHTS_NAME):
            publication.write(file.path, file.read())
    publication.write(CONFIG_NAME, config.encode("utf-8"))


Piece = tuple[str, DenseTensor, float]


def _module(delta: LoraDelta) -> str:
    return delta.target.removesuffix(".weight")


def _is_embedding(delta: LoraDelta) -> bool:
    return delta.orientation == "transposed" and bool(re.search(r"embed|wte|wpe", delta.target))


def _pieces(delta: LoraDelta, dtype: str) -> Iterator[Piece]:
    """Yield name, tensor in the dtype wanted, and the factor that is folded into it."""
    stem = PREFIX + _module(delta)
    names = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    if _is_embedding(delta):
        names = (f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B")
    yield names[0], _labelled(delta.a, dtype), 1.0
    yield names[1], _labelled(delta.b, dtype), delta.scaling
    if delta.bias is not None:
        yield f"{stem}.lora_B.bias", _labelled(delta.bias, dtype), delta.scaling
    if delta.magnitude is not None:
        yield f"{stem}.lora_magnitude_vector", _labelled(delta.magnitude, dtype), 1.0


def _labelled(tensor: DenseTensor, dtype: str) -> DenseTensor:
    def load() -> memoryview:
        return _cast(tensor, dtype, 1.0)

    return DenseTensor(tensor.name, dtype, tensor.shape, load, tensor.release)


def _cast(tensor: DenseTensor, dtype: str, factor: float) -> memoryview:
    import torch

    values = tensor_view(tensor.load(), tensor.dtype)
    if factor != 1.0 or tensor.dtype != dtype:
        values = (values.double() * factor).to(torch_dtype(dtype))
    data: Any = values.contiguous().view(torch.uint8).numpy()
    return memoryview(data)


def _write_tensors(pieces: list[Piece], adapter: Adapter, publication: Publication) -> None:
    entries, position = [], 0
    for name, tensor, _ in pieces:
        nbytes = tensor.count * ITEM_BYTES[tensor.dtype]
        entries.append(Entry(name, tensor.dtype, tensor.shape, position, position + nbytes))
        position += nbytes
    metadata = {"format": "pt"}
    if adapter.base_fingerprint:
        metadata[BASE_FINGERPRINT] = adapter.base_fingerprint
    if adapter.base_source:
        metadata[BASE_SOURCE] = adapter.base_source
    with publication.create(WEIGHTS_NAME) as file:
        views = [memoryview(encode_header(entries, metadata))]
        for _, tensor, factor in pieces:
            views.append(_cast(tensor, tensor.dtype, factor))
            tensor.release()
            for view in views:
                rest = view
                while len(rest):
                    rest = rest[file.write(rest) :]
            views.clear()


def _config(adapter: Adapter) -> dict[str, Any]:
    """Return the config: the source's own fields, and what the deltas say."""
    ranks = {_module(delta): delta.rank for delta in adapter.deltas.values()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    deltas = adapter.deltas.values()
    kept = {key: value for key, value in adapter.config.items() if not _describes_tensors(key)}
    return {
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        **kept,
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": any(delta.magnitude is not None for delta in deltas),
        "lora_bias": any(delta.bias is not None for delta in deltas),
        "fan_in_fan_out": any(
            delta.orientation == "transposed" and not _is_embedding(delta) for delta in deltas
        ),
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _describes_tensors(key: str) -> bool:
    return key in {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "peft_version",
        "auto_mapping",
    }
