"""Hugging Face safetensors: dense weights, in one file or several.

Format: https://huggingface.co/docs/safetensors. Directory: what ``save_pretrained`` of
transformers writes.
"""

from __future__ import annotations

from pathlib import Path

from loraformat.bundle.reader import is_bundle
from loraformat.card.carried import base_model_of
from loraformat.model.adapter import is_adapter_file
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.packed_weights import BITSANDBYTES, Signature, refuse_packed
from loraformat.model.written import WrittenModel
from loraformat.plugins import BaseFormat, ReadOptions, WriteOptions, quantization_methods
from loraformat.shards.quantized import method_of
from loraformat.shards.read_directory import open_model
from loraformat.shards.write_directory import write_model_directory
from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["CONVERTER", "read", "sniff", "write"]


def sniff(path: Path) -> bool:
    """Tell whether a path is a safetensors file or a directory of them that is nothing else."""
    if path.is_file():
        if path.suffix != ".safetensors":
            return False
    elif (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return False  # what lies beside an adapter is no model
    elif is_bundle(path) or all(is_adapter_file(f.name) for f in path.glob("*.safetensors")):
        return False
    # Of methods that no converter reads, `read` says which it is.
    readers, signatures = _readers()
    return method_of(path, signatures) not in readers


def _readers() -> tuple[dict[str, str], list[Signature]]:
    """Return the formats that read quantized weights, by method, and how methods are detected."""
    methods = quantization_methods()
    readers = {BITSANDBYTES: BITSANDBYTES} | {one.name: name for name, one in methods.items()}
    return readers, [one.signature for one in methods.values() if one.signature]


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Open dense weights; those that are quantized are refused, naming the method."""
    checkpoint = open_model(path, "safetensors")
    settings, tensors = checkpoint.quantization_config, checkpoint.tensors
    method = None if settings is None else settings.get("quant_method", "an unnamed method")
    if any(tensor.quantization for tensor in tensors.values()):
        method = BITSANDBYTES
    readers, more = _readers()
    try:
        original = base_model_of(checkpoint.files)
        refuse_packed(path, tensors, method, original=original, readers=readers, more=more)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def write(checkpoint: Checkpoint, publication: AtomicOutput, options: WriteOptions) -> WrittenModel:
    """Write dense weights as transformers does: ``model.safetensors``, or shards and an index."""
    return write_model_directory(
        checkpoint,
        publication,
        options,
        config=checkpoint.config,
        single_name="model.safetensors",
    )


CONVERTER = BaseFormat(
    name="safetensors",
    summary="Hugging Face safetensors: dense weights, one file or sharded",
    sniff=sniff,
    read=read,
    write=write,
    stores="dense",
    loses=("the manifest with its hashes and fingerprint",),
)
