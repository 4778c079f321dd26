"""Description of a model without reading its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

from loraformat import plugins
from loraformat.bundle.reader import Bundle, is_bundle, open_bundle
from loraformat.families.table import model_type
from loraformat.families.tensor_names import layer_of
from loraformat.hub import resolve
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.config_json import members
from loraformat.model.description import (
    AdapterSummary,
    InfoReport,
    ModelInfo,
    TensorSummary,
)
from loraformat.ops.info.adapter import description_of
from loraformat.ops.opening.model import open_model
from loraformat.storage.foreign_json import parse_object
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile

__all__ = ["AdapterSummary", "ModelInfo", "TensorSummary", "info"]

_ADAPTER_CONFIG = "adapter_config.json"
_MAX_ADAPTER_CONFIG_BYTES = 1 << 20


def info(path: str | Path, *, allow_pickle: bool = False) -> InfoReport:
    """Describe a model or an adapter without reading its weights.

    `path` is a local path or a Hub id (org/name, org/name@revision).

    Parameters
    ----------
    path : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.
    allow_pickle
        As in `convert`.

    Returns
    -------
    InfoReport
        A `ModelInfo` or an `AdapterInfo`.

    Raises
    ------
    LoraFormatError
        If it cannot be opened.
    """
    found = resolve(path, pickles=allow_pickle).path
    if is_bundle(found):
        with open_bundle(found) as bundle:
            return _summary(bundle.checkpoint, bundle)
    reader = plugins.sniff(found)
    if isinstance(reader, plugins.AdapterFormat):
        options = plugins.AdapterReadOptions(None, allow_pickle, conditional=True, inspect=True)
        with reader.read(found, options) as adapter:
            return description_of(adapter, found)
    with open_model(found, reader=reader, allow_pickle=allow_pickle) as checkpoint:
        return _summary(checkpoint, None)


def _summary(checkpoint: Checkpoint, bundle: Bundle | None) -> ModelInfo:
    tensors = list(checkpoint.tensors.values())
    quantized = checkpoint.nf4_weights
    parameters, weight_bytes = _sums(tensors)
    quantized_parameters, quantized_bytes = _sums(quantized)
    config = members(checkpoint.config) if checkpoint.config else {}
    architectures = config.get("architectures")
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.stored_as] = dtypes.get(tensor.stored_as, 0) + tensor.count
    manifest = bundle.manifest if bundle else None
    return ModelInfo(
        path=str(checkpoint.path),
        format=checkpoint.provenance.format,
        architecture=architectures[0]
        if isinstance(architectures, list) and architectures
        else None,
        model_type=model_type(config),
        layers=len({layer for tensor in tensors if (layer := layer_of(tensor.name))}),
        parameters=parameters,
        quantized_parameters=quantized_parameters,
        weight_bytes=weight_bytes,
        total_bytes=sum(path.stat().st_size for path in checkpoint.sources if path.is_file()),
        bits_per_weight=8 * weight_bytes / max(parameters, 1),
        quantized_bits_per_weight=8 * quantized_bytes / quantized_parameters if quantized else None,
        block_sizes=sorted({tensor.block_size for tensor in quantized}),
        double_quant=any(tensor.double_quant for tensor in quantized),
        dtypes=dtypes,
        fingerprint=manifest.fingerprint if manifest else None,
        created_by=manifest.created_by if manifest else None,
        source=dict(manifest.source) if manifest else {},
        quantized_before=list(checkpoint.provenance.quantized),
        adapters=[_adapter(bundle, name) for name in bundle.manifest.adapters] if bundle else [],
        tensors=[_tensor(tensor, bundle) for tensor in tensors],
    )


def _sums(tensors: Sequence[LazyTensor]) -> tuple[int, int]:
    return sum(tensor.count for tensor in tensors), sum(tensor.stored_bytes for tensor in tensors)


def _tensor(tensor: LazyTensor, bundle: Bundle | None) -> TensorSummary:
    record = bundle.manifest.tensors.get(tensor.name) if bundle else None
    return TensorSummary(
        name=tensor.name,
        encoding=(tensor.quantization or "dense").lower(),
        dtype=tensor.dtype,
        shape=tensor.shape,
        bytes=tensor.stored_bytes,
        relative_rms_error=record.relative_rms_error if record else None,
    )


def _adapter(bundle: Bundle, name: str) -> AdapterSummary:
    folder = SafeDirectory(bundle.folder.path / "adapters" / name)
    raw = folder.read(_ADAPTER_CONFIG, _MAX_ADAPTER_CONFIG_BYTES)
    config = parse_object(raw, folder.path / _ADAPTER_CONFIG)
    with contextlib.closing(MappedFile(folder, "adapter_model.safetensors")) as file:
        entries = list(file.header.entries.values())
        # lora_A is (rank, in): the shapes say the rank, whatever the config says.
        downs = [entry for entry in entries if ".lora_A" in entry.name and entry.shape]
        base = config.get("base_model_name_or_path")
        return AdapterSummary(
            name=name,
            parameters=sum(prod(entry.shape) for entry in entries),
            bytes=file.nbytes,
            ranks=sorted({entry.shape[0] for entry in downs}),
            targets=sorted({entry.name.split(".lora_A")[0].rsplit(".", 1)[-1] for entry in downs}),
            base=base if isinstance(base, str) else None,
        )
