"""NF4 in plain Python, for the test vectors: small, slow and independent of the package.

float32 arithmetic is float64 arithmetic rounded by `f32`: products of two float32 are
exact in float64, and for sums and quotients rounding twice gives the same as once.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import struct
from dataclasses import dataclass
from hashlib import sha256

TAIL = (".quant_map", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
HASHED = ("", ".absmax", ".nested_absmax", *TAIL)
OFFSET = ".nested_offset"
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Parts = dict[str, tuple[str, list[int], bytes]]


def f32(x: float) -> float:
    """Round to float32, to nearest even."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def bits(values: list[float]) -> list[int]:
    """Return float32 bit patterns."""
    return list(struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values)))


def pack(values: list[float], dtype: str) -> bytes:
    """Round float32 values to a dtype, to nearest even."""
    if dtype == "F32":
        return struct.pack(f"<{len(values)}f", *values)
    if dtype == "F16":
        return b"".join(map(_half, values))
    rounded = [(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits(values)]
    return struct.pack(f"<{len(values)}H", *rounded)


def _half(value: float) -> bytes:
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))


def round_to(values: list[float], dtype: str) -> list[float]:
    """Round values to a dtype and widen them again."""
    data = pack([f32(v) for v in values], dtype)
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return list(struct.unpack(f"<{len(values)}{'e' if dtype == 'F16' else 'f'}", data))


def levels() -> list[float]:
    """Return the 16 levels."""
    return list(struct.unpack("<16f", struct.pack("<16I", *LEVELS)))


def scale_map() -> list[float]:
    """Return the 256 values of a scale code: the entries above zero, mirrored but for the last."""
    positive = list(struct.unpack("<128f", struct.pack("<128I", *POSITIVE)))
    return [-x for x in positive[-2::-1]] + [0.0] + positive


@dataclass
class Weight:
    """What to quantize: values in the order of the logical tensor, row by row."""

    shape: list[int]
    values: list[float]
    dtype: str = "BF16"
    block_size: int = 64
    double_quant: bool = True
    transposed: bool = False
    segments: int | None = None

    def stored_values(self) -> list[float]:
        """Return the values in the order in which the codes run."""
        if not self.transposed:
            return self.values
        columns = self.shape[1]
        return [value for k in range(columns) for value in self.values[k::columns]]


def sample(shape: list[int], seed: str, dtype: str = "BF16", scale: float = 0.05) -> list[float]:
    """Return repeatable values of a bell-shaped distribution, exact in the dtype."""
    count, values = math.prod(shape), []
    for i in range(count):
        draw = sha256(f"{seed}/{i}".encode()).digest()
        uniform = [int.from_bytes(draw[k : k + 4], "little") / 2**32 for k in range(0, 32, 4)]
        values.append(scale * (sum(uniform) - 4))
    return round_to(values, dtype)


def _codes(values: list[float], size: int, table: list[float]) -> tuple[list[int], list[float]]:
    """Nearest codes, ties to the lower; whole blocks multiply by a reciprocal, the tail divides."""
    middles = [f32((a + b) / 2) for a, b in itertools.pairwise(table)]
    codes, scales = [], []
    tiny = f32(1e-38)
    for start in range(0, len(values), size):
        block = values[start : start + size]
        largest = max(map(abs, block))
        reciprocal = f32(1 / max(largest, tiny))
        for x in block:
            s = f32(x * reciprocal) if len(block) == size else f32(x / max(largest, tiny))
            codes.append(bisect.bisect_left(middles, min(1.0, max(-1.0, s))))
        scales.append(largest)
    return codes, scales


def encode(weight: Weight) -> Parts:
    """Return the stored tensors of a weight by suffix: dtype, shape, bytes."""
    if weight.segments is not None:
        return _encode_segments(weight, weight.segments)
    codes, absmax = _codes(weight.stored_values(), weight.block_size, levels())
    if len(codes) % 2:
        codes.append(7)
    packed = bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": TORCH[weight.dtype],
        "shape": weight.shape[::-1] if weight.transposed else weight.shape,
    }
    parts: Parts = {"": ("U8", [len(packed), 1], packed)}
    if weight.double_quant:
        offset = f32(math.fsum(absmax) / len(absmax))
        q, nested = _codes([f32(a - offset) for a in absmax], 256, scale_map())
        parts[".absmax"] = ("U8", [len(q)], bytes(q))
        parts[".nested_absmax"] = ("F32", [len(nested)], pack(nested, "F32"))
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        parts[".absmax"] = ("F32", [len(absmax)], pack(absmax, "F32"))
    parts[".quant_map"] = ("F32", [16], pack(levels(), "F32"))
    if weight.double_quant:
        parts[".nested_quant_map"] = ("F32", [256], pack(scale_map(), "F32"))
    raw = json.dumps(state).encode()
    parts[TAIL[2]] = ("U8", [len(raw)], raw)
    return parts


def segments_of(weight: Weight) -> list[Weight]:
    """Return the segments of a weight, each as a weight of its own."""
    number = weight.segments or 1
    count = len(weight.values) // number
    runs = (weight.values[i * count : (i + 1) * count] for i in range(number))
    return [
        Weight([count], run, weight.dtype, weight.block_size, weight.double_quant) for run in runs
    ]


def _encode_segments(weight: Weight, number: int) -> Parts:
    """Return the parts of a weight with segments: those of its segments, one after the other."""
    each = [encode(segment) for segment in segments_of(weight)]
    states = [json.loads(parts[TAIL[2]][2]) for parts in each]
    state = states[0] | {"shape": weight.shape, "segments": number}
    parts: Parts = {}
    for suffix, (dtype, shape, data) in each[0].items():
        if suffix in TAIL[:2]:
            parts[suffix] = dtype, shape, data
        elif suffix != TAIL[2]:
            joined = b"".join(one[suffix][2] for one in each)
            parts[suffix] = dtype, [number, shape[0]], joined
    if weight.double_quant:
        offsets = [one["nested_offset"] for one in states]
        parts[OFFSET] = "F32", [number], pack(offsets, "F32")
        del state["nested_offset"]
    order = ("quant_type", "blocksize", "dtype", "shape", "segments", "nested_blocksize")
    state = {key: state[key] for key in (*order, "nested_dtype") if key in state}
    raw = json.dumps(state).encode()
    return parts | {TAIL[2]: ("U8", [len(raw)], raw)}


def _segment(weight: Weight, parts: Parts, number: int) -> Parts:
    """Return the parts of one segment, as those of a weight of its own."""
    own: Parts = {}
    for suffix, (dtype, shape, data) in parts.items():
        size = len(data) // (weight.segments or 1)
        tail = suffix in TAIL
        own[suffix] = dtype, shape, data if tail else data[number * size : (number + 1) * size]
    if OFFSET in own:
        state = json.loads(own[TAIL[2]][2])
        state["nested_offset"] = struct.unpack("<f", own[OFFSET][2])[0]
        own[TAIL[2]] = "U8", [], json.dumps(state).encode()
    return own


def decode(weight: Weight, parts: Parts) -> list[float]:
    """Return the float32 values in the order of the logical tensor."""
    if weight.segments is not None:
        segments = enumerate(segments_of(weight))
        return [x for i, one in segments for x in decode(one, _segment(weight, parts, i))]
    count, absmax = math.prod(weight.shape), parts[".absmax"][2]
    if weight.double_quant:
        offset = json.loads(parts[TAIL[2]][2])["nested_offset"]
        nested = struct.unpack(
            f"<{len(parts['.nested_absmax'][2]) // 4}f", parts[".nested_absmax"][2]
        )
        table = scale_map()
        scales = [f32(f32(table[q] * nested[i // 256]) + offset) for i, q in enumerate(absmax)]
    else:
        scales = list(struct.unpack(f"<{len(absmax) // 4}f", absmax))
    level = levels()
    values = []
    for i in range(count):
        byte = parts[""][2][i // 2]
        code = byte & 15 if i % 2 else byte >> 4
        values.append(f32(level[code] * scales[i // weight.block_size]))
    if weight.transposed:
        rows = weight.shape[0]
        values = [value for k in range(rows) for value in values[k::rows]]
    return values


def relative_error(weight: Weight, decoded: list[float]) -> float:
    """Return the relative RMS error, rounded to 6 digits so that no machine differs."""
    wrong = math.fsum((x - y) ** 2 for x, y in zip(weight.values, decoded, strict=True))
    total = math.fsum(x * x for x in weight.values)
    return float(f"{math.sqrt(wrong / total):.6g}") if total else 0.0


def digest(parts: Parts) -> str:
    """Return the SHA-256 of the parts, each after its length."""
    h = sha256()
    cut = "segments" in json.loads(parts[TAIL[2]][2])
    for suffix in (*HASHED, *[OFFSET] * cut):
        data = parts[suffix][2] if suffix in parts else b""
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


LEVELS = (
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)  # fmt: skip
POSITIVE = (
    0x3513A3B7, 0x365A1A94, 0x370205FF, 0x37B24206, 0x38378034, 0x388AEFB3, 0x38BA1F4B, 0x3923D70B,
    0x398CE705, 0x39C7E283, 0x3A016F01, 0x3A1EECC1, 0x3A3C6A80, 0x3A59E83E, 0x3A7765FF, 0x3AA7EF9D,
    0x3AF1A9FC, 0x3B1DB22D, 0x3B428F5C, 0x3B676C8A, 0x3B8624DD, 0x3B989374, 0x3BAB020D, 0x3BBD70A4,
    0x3BCFDF3B, 0x3BE24DD3, 0x3BF4BC6A, 0x3C039581, 0x3C0CCCCD, 0x3C160418, 0x3C1F3B64, 0x3C3AE148,
    0x3C68F5C3, 0x3C8B851F, 0x3CA28F5D, 0x3CB9999A, 0x3CD0A3D7, 0x3CE7AE15, 0x3CFEB852, 0x3D0AE148,
    0x3D166667, 0x3D21EB85, 0x3D2D70A3, 0x3D38F5C3, 0x3D447AE1, 0x3D500000, 0x3D5B851F, 0x3D670A3D,
    0x3D728F5D, 0x3D7E147B, 0x3D84CCCD, 0x3D8A8F5D, 0x3D9051EB, 0x3D96147B, 0x3D9BD70A, 0x3DA1999A,
    0x3DA75C2A, 0x3DAD1EB8, 0x3DB2E148, 0x3DB8A3D7, 0x3DBE6667, 0x3DC428F7, 0x3DC9EB85, 0x3DDB3334,
    0x3DF80000, 0x3E0A6666, 0x3E18CCCD, 0x3E273333, 0x3E35999A, 0x3E440000, 0x3E526666, 0x3E60CCCD,
    0x3E6F3333, 0x3E7D9999, 0x3E860000, 0x3E8D3334, 0x3E946666, 0x3E9B999A, 0x3EA2CCCC, 0x3EAA0000,
    0x3EB13333, 0x3EB86666, 0x3EBF999A, 0x3EC6CCCC, 0x3ECE0000, 0x3ED53333, 0x3EDC6666, 0x3EE3999A,
    0x3EEACCCC, 0x3EF20000, 0x3EF93332, 0x3F003333, 0x3F03CCCC, 0x3F076666, 0x3F0B0000, 0x3F0E999A,
    0x3F123334, 0x3F15CCCD, 0x3F196666, 0x3F1D0000, 0x3F20999A, 0x3F243334, 0x3F27CCCD, 0x3F2B6666,
    0x3F2F0000, 0x3F32999A, 0x3F363334, 0x3F39CCCD, 0x3F3D6666, 0x3F410000, 0x3F44999A, 0x3F483333,
    0x3F4BCCCD, 0x3F4F6666, 0x3F530000, 0x3F56999A, 0x3F5A3333, 0x3F5DCCCD, 0x3F616666, 0x3F650000,
    0x3F68999A, 0x3F6C3333, 0x3F6FCCCD, 0x3F736666, 0x3F770000, 0x3F7A999A, 0x3F7E3333, 0x3F800000,
)  # fmt: skip
