"""The bundle converter: reading and writing.

Writing is a model directory with a manifest. The manifest comes last; without it the
directory is not a bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loraformat.bundle.manifest import Manifest, fingerprint
from loraformat.bundle.reader import is_bundle, open_bundle
from loraformat.families.table import family_of
from loraformat.model.architecture import skip_modules
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import join, model_dtype, parse
from loraformat.model.nf4_parts import SEGMENT_METHOD
from loraformat.model.quantization_history import EXTENSION, to_extension
from loraformat.model.written import FileRecord, WrittenModel
from loraformat.plugins import BaseFormat, ReadOptions, WriteOptions
from loraformat.shards.write_directory import write_model_directory
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.safe_paths import CARD_NAME, MANIFEST_NAME
from loraformat.version import __version__

__all__ = [
    "CONVERTER",
    "AdapterRecords",
    "quantization_config",
    "quantized_config",
    "read",
    "write",
]


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a bundle's base; every tensor is compared with its SHA-256 when it is loaded."""
    return open_bundle(path).checkpoint


#: Name, and path in the adapter's directory, of what belongs to an adapter.
AdapterRecords = dict[str, dict[str, FileRecord]]


def write(
    checkpoint: Checkpoint,
    publication: AtomicOutput,
    options: WriteOptions,
    *,
    add_adapters: Callable[[str], AdapterRecords] = lambda fingerprint: {},
) -> WrittenModel:
    """Write a bundle.

    `add_adapters` is called with the fingerprint of the base once it is written; it writes
    ``adapters/NAME`` into the publication and returns what the manifest shall list.
    """
    written = write_model_directory(
        checkpoint,
        publication,
        options,
        config=quantized_config(checkpoint),
        tell_history=False,  # the manifest does
    )
    base = fingerprint(written.shards.tensors)
    version, extensions = Manifest.version_of(written.shards.tensors)
    quantized = checkpoint.provenance.quantized
    manifest = Manifest(
        created_by=f"loraformat {__version__}",
        source=checkpoint.provenance.to_json(),
        shard_limit=options.shard_limit,
        shards=tuple(written.shards.shards),
        tensors=written.shards.tensors,
        files={path: file for path, file in written.files.items() if path != CARD_NAME},
        fingerprint=base,
        adapters=add_adapters(base),
        extensions=extensions | ({EXTENSION: to_extension(quantized)} if quantized else {}),
        format_version=version,
    )
    publication.write(MANIFEST_NAME, manifest.encode())
    if checkpoint.config is None:
        written.notes.append("no config.json: transformers cannot open this bundle")
    return written


def quantized_config(checkpoint: Checkpoint) -> bytes | None:
    """Return ``config.json`` with the ``quantization_config`` that makes peers open NF4."""
    if checkpoint.config is None or not checkpoint.nf4_weights:
        return checkpoint.config
    settings = checkpoint.quantization_config or quantization_config(checkpoint)
    return join(checkpoint.config, settings)


def quantization_config(checkpoint: Checkpoint) -> dict[str, object]:
    """Return what transformers writes for a model quantized as this one.

    bitsandbytes cannot open weights in segments: such a model names loraformat's own quantizer.
    """
    quantized = checkpoint.nf4_weights
    family = family_of(parse(checkpoint.config) if checkpoint.config else {})
    names = (tensor.name for tensor in quantized)
    config = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": model_dtype(checkpoint.config) or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(tensor.double_quant for tensor in quantized),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules(checkpoint.dense_tensors, names, family),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    if any(tensor.segments is not None for tensor in quantized):
        own = {
            key: value for key, value in config.items() if not key.strip("_").startswith("load_in")
        }
        return own | {"quant_method": SEGMENT_METHOD}
    return config


CONVERTER = BaseFormat(
    name="loraformat",
    summary="bundle: NF4 base weights with a manifest, hashes and optional adapters",
    sniff=is_bundle,
    read=read,
    write=write,
    stores="nf4",
    segments=True,
)
