"""Decoding: bit for bit the plain formula, any range, any alignment, any thread count."""

import mmap

import pytest
import torch

from loraformat.errors import UsageError
from loraformat.nf4 import kernels
from tests import torch_codec as codec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(64, 48), (64, 96), (144, 4304), (333, 17), (3, 5, 7), (1,), (63,), (65,), (300_001,)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(kernel, formula, same, normal, shape, dtype, double_quant):
    q = codec.quantize(normal(*shape), double_quant=double_quant)
    expected = formula.decode(q, dtype)
    same(codec.dequantize(q, dtype=dtype), expected)
    out = torch.empty(shape, dtype=dtype)
    assert codec.dequantize(q, out=out) is out
    same(out.view(-1), expected)


@pytest.mark.parametrize("block_size", codec.BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes(kernel, formula, same, normal, block_size, dtype):
    q = codec.quantize(normal(3 * 4096 + 77), block_size=block_size)
    same(codec.dequantize(q, dtype=dtype), formula.decode(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes(kernel, same, normal, dtype, double_quant):
    """On a shape that its AVX-512 code decodes correctly: rows are multiples of the block."""
    import bitsandbytes.functional as bnb

    q = codec.quantize(normal(96, 256), double_quant=double_quant)
    absmax = q.scales()
    state = bnb.QuantState(absmax, (96, 256), codec.levels(), 64, "nf4", dtype)
    same(codec.dequantize(q, dtype=dtype), bnb.dequantize_4bit(q.packed, state).flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_at_every_magnitude(kernel, formula, same, dtype):
    """Scales from subnormal to overflow in the narrow types, both signs of zero included."""
    exponents = torch.arange(-149, 127).double()
    scales = torch.cat([torch.exp2(exponents), 1.4142 * torch.exp2(exponents)]).float()
    packed = torch.arange(256, dtype=torch.uint8).repeat(scales.numel() // 8)
    q = codec.NF4(packed, scales, packed.numel() * 2, 64)
    same(codec.dequantize(q, dtype=dtype), formula.decode(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_ranges_equal_slices(kernel, same, normal, dtype, double_quant, block_size):
    q = codec.quantize(normal(70_001), block_size=block_size, double_quant=double_quant)
    whole, scales = codec.dequantize(q, dtype=dtype), q.scales()
    edges = (0, 1, 2, 31, 32, 63, 64, 65, 127, 4095, 4096, 16_385, 65_537, 70_000, 70_001)
    for start in edges:
        for stop in edges:
            if start <= stop:
                part = codec.dequantize(q, dtype=dtype, start=start, stop=stop)
                same(part, whole[start:stop])
                out = torch.empty(stop - start, dtype=dtype)
                same(codec.dequantize(q, out=out, start=start, stop=stop, scales=scales), part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tensor_written_past_the_cache(kernel, formula, same, normal, dtype):
    """2 MiB and more: aligned or not, in one thread or several."""
    q = codec.quantize(normal(1_100_033))
    expected = formula.decode(q, dtype)
    memory = torch.zeros(q.count + 64, dtype=dtype)
    for shift in (0, 1, 7, 32):
        out = memory[shift : shift + q.count]
        same(codec.dequantize(q, out=out, threads=3), expected)
        assert memory[:shift].abs().sum() == memory[shift + q.count :].abs().sum() == 0
        memory.zero_()


def test_threads_do_not_matter(kernel, same, normal):
    q = codec.quantize(normal(900_001))
    one = codec.dequantize(q, threads=1, start=777)
    same(one, codec.dequantize(q, threads=7, start=777))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("dtype", DTYPES)
def test_read_only_and_unaligned_memory(kernel, formula, same, normal, dtype, tmp_path):
    """As a mapped file gives it: every tensor at an odd address."""
    x = normal(10_001, dtype=dtype)
    q = codec.quantize(x)
    plain = codec.quantize(x, double_quant=False)
    parts = [x, q.packed, q.absmax, q.nested_absmax, plain.absmax]
    blobs = [part.view(torch.uint8).numpy().tobytes() for part in parts]
    path = tmp_path / "tensors"
    path.write_bytes(b"".join(b"?" * (1 + len(blob) % 2) + blob for blob in blobs))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    views, end = [], 0
    for part, blob in zip(parts, blobs, strict=True):
        end += 1 + len(blob) % 2
        views.append(torch.frombuffer(mapped, dtype=part.dtype, count=part.numel(), offset=end))
        end += len(blob)
    assert views[0].data_ptr() % 2 == 1
    again = codec.quantize(views[0])
    same(again.packed, q.packed)
    same(again.absmax, q.absmax)
    double = codec.NF4(views[1], views[2], x.numel(), 64, views[3], q.nested_offset)
    same(codec.dequantize(double, dtype=dtype), formula.decode(q, dtype))
    single = codec.NF4(views[1], views[4], x.numel(), 64)
    same(codec.dequantize(single, dtype=dtype), formula.decode(plain, dtype))
    assert codec.quantization_error(views[0], double) == codec.quantization_error(x, q)


def quantized(**changes):
    fields = {
        "packed": torch.zeros(65, dtype=torch.uint8), "absmax": torch.zeros(3, dtype=torch.uint8),
        "count": 130, "block_size": 64, "nested_absmax": torch.zeros(1), "nested_offset": 0.0,
    }  # fmt: skip
    return codec.NF4(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"packed": torch.zeros(64, dtype=torch.uint8)},
        {"packed": torch.zeros(65, dtype=torch.int8)},
        {"packed": torch.zeros(130, dtype=torch.uint8)[::2]},
        {"absmax": torch.zeros(3)},
        {"absmax": torch.zeros(2, dtype=torch.uint8)},
        {"nested_absmax": torch.zeros(2)},
        {"nested_absmax": None},
        {"nested_offset": None},
        {"count": 129 + 64},
        {"count": -1},
        {"block_size": 63},
    ],
)
def test_parts_that_do_not_fit_are_refused(changes):
    """A kernel would read past the end of them."""
    assert codec.dequantize(quantized()).numel() == 130
    with pytest.raises(UsageError):
        quantized(**changes)


@pytest.mark.parametrize(
    "options",
    [
        {"start": -1}, {"stop": 131}, {"start": 5, "stop": 4}, {"dtype": torch.float64},
        {"out": torch.zeros(129)}, {"out": torch.zeros(260)[::2]}, {"scales": torch.zeros(2)},
        {"out": torch.zeros(130, dtype=torch.int32)}, {"threads": 0}, {"threads": -2},
    ],
)  # fmt: skip
def test_refusals(kernel, options):
    with pytest.raises(UsageError):
        codec.dequantize(quantized(), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("shape", [(40, 1024), (33, 130), (70, 30), (3, 4200)], ids=str)
def test_rows_of_a_matrix(kernel, same, normal, shape, block_size, double_quant, dtype):
    rows, columns = shape
    before = 3 * columns // 2  # of another matrix, as in a stack of experts
    q = codec.quantize(
        normal(before + rows * columns), block_size=block_size, double_quant=double_quant
    )
    whole = codec.dequantize(q, dtype=dtype)[before:].view(shape)
    parts = [(0, rows, 0, columns), (0, rows, 0, columns // 2), (1, rows, 3, columns - 5)]
    parts += [(rows - 1, rows, 0, columns), (1, 3, columns - 1, columns), (0, rows, 512, 768)]
    for first, last, left, right in parts:
        if right > columns:
            continue
        out = torch.empty(last - first, right - left, dtype=dtype)
        start = before + first * columns + left
        assert codec.dequantize_rows(q, out, start=start, stride=columns) is out
        same(out, whole[first:last, left:right])


def test_rows_of_tables_anywhere_in_memory(kernel, same, normal):
    """Packed codes and scales as views behind other bytes, as in a mapped shard."""
    q = codec.quantize(normal(64, 256))
    packed, absmax = (
        torch.cat([torch.zeros(64, dtype=torch.uint8), t])[64:] for t in (q.packed, q.absmax)
    )
    view = codec.NF4(packed, absmax, q.count, 64, q.nested_absmax, q.nested_offset)
    out = torch.empty(60, 128)
    codec.dequantize_rows(view, out, start=2 * 256 + 64, stride=256)
    same(out, codec.dequantize(q, dtype=torch.float32).view(64, 256)[2:62, 64:192])


@pytest.mark.parametrize("start, stride, columns", [(64, 256, 192), (2, 254, 128), (1, 253, 77)])
def test_numpy_decodes_rows_together(monkeypatch, same, normal, start, stride, columns):
    """Not row by row, whatever blocks their parts begin in: thousands of rows make a block."""
    q, calls, one = codec.quantize(normal(5000), block_size=128), [], kernels.get("numpy")
    plain = one.dequantize
    monkeypatch.setattr(one, "dequantize", lambda *a: (calls.append(a), plain(*a)), raising=False)
    monkeypatch.setenv(kernels.VARIABLE, "numpy")
    out = torch.empty(19, columns)
    codec.dequantize_rows(q, out, start=start, stride=stride)
    assert len(calls) <= 1
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    whole = codec.dequantize(q, dtype=torch.float32)
    same(out, whole.as_strided((19, columns), (stride, 1), start).contiguous())


def test_no_rows(kernel, normal):
    q = codec.quantize(normal(128))
    assert codec.dequantize_rows(q, torch.empty(0, 64)).shape == (0, 64)
    assert codec.dequantize_rows(q, torch.empty(3, 0), stride=9).shape == (3, 0)


@pytest.mark.parametrize(
    "out, options, message",
    [
        (torch.empty(2, 65), {}, "range"),
        (torch.empty(2, 60), {"stride": 70}, "range"),
        (torch.empty(2, 60), {"start": -1}, "range"),
        (torch.empty(2, 60), {"stride": 59}, "overlap"),
        (torch.empty(60), {}, "rows"),
        (torch.empty(2, 60, dtype=torch.float64), {}, "float64"),
        (torch.empty(2, 60)[:, ::2], {}, "contiguous"),
    ],
)
def test_rows_that_do_not_fit(normal, out, options, message):
    with pytest.raises(UsageError, match=message):
        codec.dequantize_rows(codec.quantize(normal(128)), out, **options)
