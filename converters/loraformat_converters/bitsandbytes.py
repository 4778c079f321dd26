"""bitsandbytes 4-bit checkpoints: NF4, with or without double quantization.

Format: ``QuantState.as_dict(packed=True)`` of bitsandbytes, inside a safetensors model
directory that transformers wrote. Codes and scales go through untouched, both ways. The layouts
that others use for experts are read; they are written by `loraformat.ops.encoding.nf4_experts`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loraformat.bundle.converter import quantized_config
from loraformat.errors import UnsupportedError, printable
from loraformat.model.architecture import is_conv1d
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.packed_weights import BITSANDBYTES, BITSANDBYTES_FP4, BITSANDBYTES_INT8
from loraformat.model.written import WrittenModel
from loraformat.plugins import BaseFormat, ReadOptions, WriteOptions
from loraformat.shards.quantized import method_of
from loraformat.shards.read_directory import open_model, peek_config
from loraformat.shards.write_directory import write_model_directory
from loraformat.storage.atomic_output import AtomicOutput
from loraformat_converters.experts4bit import with_experts4bit

__all__ = ["CONVERTER", "read", "sniff", "write"]


def sniff(path: Path) -> bool:
    """Tell whether the names of the tensors, or the config, speak of bitsandbytes."""
    return method_of(path) == BITSANDBYTES


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a 4-bit checkpoint of NF4; FP4 and int8 are formats of their own."""
    _refuse_other_types(path)
    config = peek_config(path) if path.is_dir() else {}
    model_type = config.get("model_type")
    checkpoint = open_model(
        path,
        "bitsandbytes",
        transposed=lambda name: is_conv1d(name, model_type),
        any_storage=True,
    )
    try:
        checkpoint.tensors = with_experts4bit(checkpoint, config)
    except BaseException:
        checkpoint.close()
        raise
    if not checkpoint.nf4_weights:
        checkpoint.close()
        raise UnsupportedError("holds no NF4 weight", path=path, hint="use --from safetensors")
    if any(tensor.segments is not None for tensor in checkpoint.nf4_weights):
        checkpoint.quantization_config = None  # bitsandbytes knows no segments
    if checkpoint.quantization_config is not None:
        # The codes are written as uint8 whatever their label was; the bytes are the same.
        checkpoint.quantization_config["bnb_4bit_quant_storage"] = "uint8"
    return checkpoint


def _refuse_other_types(path: Path) -> None:
    method = method_of(path)
    if method in (BITSANDBYTES_FP4, BITSANDBYTES_INT8):
        raise UnsupportedError(
            f"is quantized as {method}, not NF4", path=path, hint=f"use --from {method}"
        )


def write(checkpoint: Checkpoint, publication: AtomicOutput, options: WriteOptions) -> WrittenModel:
    """Write what transformers writes for a 4-bit model: the same tensors, names and config."""
    written = write_model_directory(
        checkpoint,
        publication,
        options,
        config=quantized_config(checkpoint),
        single_name="model.safetensors",
    )
    return replace(written, notes=[*written.notes, *_wrong_on_a_cpu(checkpoint)])


def _wrong_on_a_cpu(checkpoint: Checkpoint) -> list[str]:
    """Say which weights bitsandbytes decodes wrongly on a CPU with AVX-512: version 0.50.2, run."""
    wrong = [
        tensor.name
        for tensor in checkpoint.nf4_weights
        if tensor.stored_shape
        if (columns := tensor.stored_shape[-1]) % 16 == 0 and columns % tensor.block_size
    ]
    if not wrong:
        return []
    return [
        f"{len(wrong)} weights ({printable(wrong[0])}, ...) have rows that are not a whole number "
        "of blocks: bitsandbytes 0.50.2 decodes these incorrectly on a CPU with AVX-512, "
        "including its own; to run there, exclude them with --skip, or quantize with a "
        "--block-size that divides rows"
    ]


CONVERTER = BaseFormat(
    name="bitsandbytes",
    summary="bitsandbytes 4-bit checkpoint: NF4 as transformers saves it",
    sniff=sniff,
    read=read,
    write=write,
    stores="nf4",
    expert_layouts=("dense", "each", "fused", "experts4bit"),
    loses=("the manifest with its hashes and fingerprint",),
)
