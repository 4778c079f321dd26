"""What other programs do of the same jobs: each a script, as a user would write it."""

from __future__ import annotations

__all__ = ["COPY", "DEQUANTIZE", "FROM_NF4", "TRANSFORMERS"]

#: Reads a file, or all shards of a directory, and writes as many bytes as another has.
COPY = """
import os, sys
from pathlib import Path
source, like, target = map(Path, sys.argv[1:])
def files(path):
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
buffer = bytearray(8 << 20)
for name in files(source):
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
with open(target, "wb", buffering=0) as copy:
    for name in files(like):
        with open(name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                copy.write(memoryview(buffer)[:count])
    os.fsync(copy.fileno())
"""

#: NF4 to GGUF of a type with bitsandbytes and gguf-py, tensor by tensor, without a tokenizer.
FROM_NF4 = """
import json, sys
from math import prod
from pathlib import Path
import numpy
from bitsandbytes.functional import QuantState, dequantize_4bit
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, GGUFWriter, quants
from safetensors import safe_open

source, target, word = sys.argv[1:]
writer = GGUFWriter(target, "llama")
weights = []
for path in sorted(Path(source).glob("*.safetensors")):
    shard = safe_open(path, "pt")
    for name in shard.keys():
        if name.endswith(".weight"):
            parts = [part for part in shard.keys() if part.startswith(name + ".")]
            weights.append((shard, name, {part.removeprefix(name + "."): part for part in parts}))

def shape_of(shard, name, parts):
    for key, part in parts.items():
        if key.startswith("quant_state"):
            return json.loads(shard.get_tensor(part).numpy().tobytes())["shape"]
    return shard.get_slice(name).get_shape()

def load(shard, name, parts):
    tensor = shard.get_tensor(name)
    if not parts:
        return tensor
    state = {key: shard.get_tensor(part) for key, part in parts.items()}
    return dequantize_4bit(tensor, QuantState.from_dict(state, device="cpu"))

kinds = []
for weight in weights:
    shape = list(shape_of(*weight))
    kind = Type[word] if len(shape) > 1 else Type.F32
    block, nbytes = GGML_QUANT_SIZES[kind]
    total = prod(shape) // block * nbytes
    dtype = {Type.F32: numpy.float32, Type.F16: numpy.float16}.get(kind, numpy.uint8)
    if dtype is numpy.uint8:
        shape[-1] = shape[-1] // block * nbytes
    writer.add_tensor_info(weight[1], shape, numpy.dtype(dtype), total, raw_dtype=kind)
    kinds.append(kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
for weight, kind in zip(weights, kinds):
    writer.write_tensor_data(quants.quantize(load(*weight).float().numpy(), kind))
writer.close()
"""

#: GGUF to dense safetensors.
TRANSFORMERS = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, GgufConfig
source = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(
    source.parent, gguf_file=source.name, dtype=torch.bfloat16,
    quantization_config=GgufConfig(dequantize=True),
)
model.hf_quantizer = None  # transformers 5.23 would refuse to save what it has dequantized
model.save_pretrained(sys.argv[2])
"""

#: Only reads a GGUF file and dequantizes it; keeps nothing.
DEQUANTIZE = """
import sys
from gguf import GGUFReader, quants
for tensor in GGUFReader(sys.argv[1]).tensors:
    quants.dequantize(tensor.data, tensor.tensor_type)
"""
