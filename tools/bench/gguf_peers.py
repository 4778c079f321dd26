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
import sys, torch
from pathlib import Path
from bitsandbytes.functional import QuantState, dequantize_4bit
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors import safe_open
source, target, word = sys.argv[1:]
kind = GGMLQuantizationType[word]
writer = GGUFWriter(target, "llama", use_temp_file=False)
shards = [safe_open(path, "pt") for path in sorted(Path(source).glob("*.safetensors"))]
def stored(numbers):
    if numbers.ndim < 2:
        return numbers.float().numpy(), GGMLQuantizationType.F32
    return quants.quantize(numbers.float().numpy(), kind), kind
plan = []
for shard in shards:
    names = set(shard.keys())
    for name in sorted(names):
        if name.endswith(".weight"):
            state = {n[len(name) + 1 :]: n for n in names if n.startswith(name + ".")}
            plan.append((shard, name, state))
def load(shard, name, state):
    tensor = shard.get_tensor(name)
    if not state:
        return tensor
    parts = {key: shard.get_tensor(full) for key, full in state.items()}
    return dequantize_4bit(tensor, QuantState.from_dict(parts, device="cpu"))
def shape(shard, name, state):
    if not state:
        return tuple(shard.get_slice(name).get_shape())
    packed = next(key for key in state if key.startswith("quant_state"))
    parts = {packed: shard.get_tensor(state[packed])}
    import json
    return tuple(json.loads(bytes(parts[packed].numpy().tobytes()))["shape"])
import numpy
for item in plan:
    size = shape(*item)
    one = GGMLQuantizationType.F32 if len(size) < 2 else kind
    block, nbytes = __import__("gguf").GGML_QUANT_SIZES[one]
    total = int(numpy.prod(size)) // block * nbytes
    if one in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = numpy.float32 if one is GGMLQuantizationType.F32 else numpy.float16
        writer.add_tensor_info(item[1], size, numpy.dtype(dtype), total)
    else:
        rows = (*size[:-1], size[-1] // block * nbytes)
        writer.add_tensor_info(item[1], rows, numpy.dtype(numpy.uint8), total, raw_dtype=one)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
for item in plan:
    writer.write_tensor_data(stored(load(*item))[0])
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
