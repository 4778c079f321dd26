"""A GGUF file written anew with something changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggml_oracle import quantize
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf
from loraformat_converters.gguf.quantization.blocks import dequantize

from loraformat.storage.atomic_file import AtomicFile


def rewrite(
    source: Path,
    target: Path,
    *,
    kind: GGMLType | None = None,
    drop: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Copy a file, without keys and tensors that begin so, with matrices in another type.

    ``changes`` are values by key, with ``__`` for the dot.
    """
    with open_gguf(source) as file, AtomicFile(target, plan="rewrite") as output:
        metadata = {k: v for k, v in file.metadata.items() if not k.startswith(drop or ("\0",))}
        metadata |= {key.replace("__", "."): value for key, value in changes.items()}
        tensors = []
        for tensor in file.tensors.values():
            if tensor.name.startswith(drop or ("\0",)):
                continue
            data, stored = file.load(tensor.name), tensor.type
            if kind is not None and len(tensor.shape) > 1:
                values = dequantize(data, stored, tensor.shape)
                data, stored = memoryview(quantize(values, kind)), kind
            tensors.append(PlannedTensor(tensor.name, tensor.shape, stored, lambda d=data: [d]))
        write_gguf(output, metadata, tensors)
        output.commit()
    return target
