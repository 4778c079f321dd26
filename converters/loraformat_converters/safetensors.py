"""Hugging Face safetensors: dense weights, in one file or several.

Format: https://huggingface.co/docs/safetensors. Directory: what ``save_pretrained`` of
transformers writes.
"""

from __future__ import annotations

from pathlib import Path

from loraformat.bundle.reader import is_bundle
from loraformat.card.carried import base_model_of
from loraformat.errors import UnsupportedError
from loraformat.model.adapter import is_adapter_file
from loraformat.model.checkpoint import Checkpoint, NF4Tensor
from loraformat.model.packed_weights import FLOAT8, MXFP4, packed_weights, refuse_packed
from loraformat.model.written import WrittenModel
from loraformat.plugins import Converter, WriteOptions
from loraformat.shards.read_directory import (
    is_bitsandbytes,
    open_model,
    peek_config,
    stored_entries,
)
from loraformat.shards.write_directory import write_model_directory
from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["CONVERTER", "read", "sniff", "write"]


def sniff(path: Path) -> bool:
    """Tell whether a path is a safetensors file or a directory of them that is nothing else."""
    if path.is_file():
        return path.suffix == ".safetensors" and not is_bitsandbytes(path) and not _packed(path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return False  # what lies beside an adapter is no model
    if is_bundle(path) or all(is_adapter_file(f.name) for f in path.glob("*.safetensors")):
        return False
    method = _method(path)
    if method == "bitsandbytes" or (method is None and is_bitsandbytes(path)):
        return False
    return not _packed(path)


def _packed(path: Path) -> bool:
    """Tell whether another converter reads the weights; of other methods `read` says which."""
    found = packed_weights(stored_entries(path))
    return found is not None and found.method in (FLOAT8, MXFP4)


def _method(path: Path) -> object:
    quantization = peek_config(path).get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def read(path: Path) -> Checkpoint:
    """Open dense weights.

    Raises
    ------
    UnsupportedError
        If they are quantized, by any method: naming it.
    """
    checkpoint = open_model(path, "safetensors")
    try:
        _refuse_quantized(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = checkpoint.quantization_config
    method = None if settings is None else settings.get("quant_method", "an unnamed method")
    tensors = checkpoint.tensors
    if method == "bitsandbytes" or any(isinstance(t, NF4Tensor) for t in tensors.values()):
        raise UnsupportedError(
            "is quantized with bitsandbytes, not dense",
            path=checkpoint.path,
            hint="use --from bitsandbytes",
        )
    refuse_packed(checkpoint.path, tensors, method, base_model_of(checkpoint.files))


def write(checkpoint: Checkpoint, publication: AtomicOutput, options: WriteOptions) -> WrittenModel:
    """Write dense weights as transformers does: ``model.safetensors``, or shards and an index."""
    return write_model_directory(
        checkpoint,
        publication,
        config=checkpoint.config,
        shard_limit=options.shard_limit,
        progress=options.progress,
        single_name="model.safetensors",
    )


CONVERTER = Converter(
    name="safetensors",
    kind="base",
    summary="Hugging Face safetensors: dense weights, one file or sharded",
    sniff=sniff,
    read=read,
    write=write,
    stores="dense",
    loses=("the manifest with its hashes and fingerprint",),
)
