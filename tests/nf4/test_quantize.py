"""Encoding: bit for bit the plain formula and bitsandbytes, on every kernel."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat.errors import NonFiniteError, UsageError
from tests import torch_codec as codec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(64, 48), (128, 192), (144, 4304), (333, 17), (3, 5, 7), (2, 64, 32), (1,), (2,), (63,),
          (64,), (65,), (4095,), (4097,), (262_144 + 31,)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_and_bitsandbytes(kernel, formula, same, normal, shape, dtype):
    x = normal(*shape, dtype=dtype)
    q = codec.quantize(x, double_quant=False)
    code, absmax = formula.codes(x, 64)
    same(q.packed, formula.pack(code))
    same(q.absmax, absmax)
    packed, peer = bitsandbytes_quantize(x, 64)
    same(q.packed, packed)
    same(q.absmax, peer)


def bitsandbytes_quantize(x, block_size):
    import bitsandbytes  # noqa: F401  (registers the operator)

    op = torch.ops.bitsandbytes.quantize_4bit.default
    packed, absmax = op(x, block_size, "nf4", torch.uint8)
    return packed.flatten(), absmax


@pytest.mark.parametrize("block_size", codec.BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes(kernel, formula, same, normal, block_size, dtype):
    for count in (5 * 4096, 4 * 4096 + 99, block_size - 1, block_size + 2):
        x = normal(count, dtype=dtype, seed=count)
        q = codec.quantize(x, block_size=block_size, double_quant=False)
        packed, absmax = bitsandbytes_quantize(x, block_size)
        same(q.packed, packed)
        same(q.absmax, absmax)
        same(q.packed, formula.pack(formula.codes(x, block_size)[0]))


def test_on_and_beside_every_threshold(kernel, formula, same):
    on = (codec.levels()[:-1] + codec.levels()[1:]) / 2
    around = [on, on.nextafter(torch.tensor(2.0)), on.nextafter(torch.tensor(-2.0)), codec.levels()]
    values = torch.cat([*around, torch.tensor([1.0, -1.0, 0.0])])  # 64 values, absmax exactly 1
    x = torch.cat([values, values * 2.0**40, values[:-1]])
    expected = torch.bucketize(values, on)
    assert expected[:15].tolist() == list(range(15)), "a tie goes to the lower code"
    q = codec.quantize(x, double_quant=False)
    same(q.packed, formula.pack(torch.cat([expected, expected, expected[:-1]])))


def test_scales_that_do_not_divide_exactly(kernel, formula, same, normal):
    """A million quotients a few units in the last place around a threshold."""
    on = (codec.levels()[:-1] + codec.levels()[1:]) / 2
    largest = normal(1 << 14, seed=1).abs() + 0.1
    x = (largest[:, None] * on.repeat(5)[:63]).contiguous()
    x = (x.view(torch.int32) + torch.arange(-31, 32, dtype=torch.int32) // 12).view(torch.float32)
    x = torch.cat([largest[:, None], x], 1)
    same(codec.quantize(x).packed, formula.pack(formula.codes(x, 64)[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks(kernel, dtype):
    q = codec.quantize(torch.zeros(200, dtype=dtype), double_quant=False)
    assert q.packed.unique().tolist() == [0x77]
    assert q.absmax[:3].tolist() == [0, 0, 0]
    assert q.absmax[3] == torch.tensor(1e-38), "an incomplete block stores the floor"
    assert codec.dequantize(q).abs().max() == 0
    double = codec.quantize(torch.zeros(200, dtype=dtype))
    assert codec.dequantize(double, dtype=torch.float32).abs().max() < 1e-37


def test_negative_zero_is_zero(kernel, same):
    x = torch.zeros(128)
    x[:64] = 1
    x[10] = -0.0
    x[64:] = -0.0
    q = codec.quantize(x, double_quant=False)
    assert q.packed[5] >> 4 == 7
    assert q.packed[32:].unique().tolist() == [0x77]
    same(q.absmax, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    "largest", [1e-45, 1e-40, 1e-38, 1.2e-38, 1e-30, 3.4e38, torch.finfo().max]
)
def test_subnormal_and_huge(kernel, formula, same, normal, largest):
    x = normal(640)
    x = x / x.abs().max() * largest
    x[::50] = largest
    for part in (x, x[:601]):
        q = codec.quantize(part, double_quant=False)
        packed, absmax = bitsandbytes_quantize(part, 64)
        same(q.packed, packed)
        same(q.absmax, absmax)
        same(codec.dequantize(q, dtype=torch.float32), formula.decode(q))
        codec.quantize(part)  # the mean of huge scales does not overflow


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 63, 64, 70_001, 699_999])
def test_non_finite_is_refused_with_its_position(kernel, normal, bad, dtype, position):
    x = normal(700, 1000, dtype=dtype)
    x.view(-1)[position] = bad
    x.view(-1)[-1] = bad
    with pytest.raises(NonFiniteError, match=rf"model\.w holds {bad} at element {position},"):
        codec.quantize(x, name="model.w", threads=3)


def test_non_finite_in_the_incomplete_block(kernel):
    with pytest.raises(NonFiniteError) as caught:
        codec.quantize(torch.tensor([1.0, float("inf"), 2.0]))
    assert (caught.value.position, caught.value.value) == (1, float("inf"))


def test_empty(kernel):
    for double_quant in (False, True):
        q = codec.quantize(torch.zeros(0, 4), double_quant=double_quant)
        assert q.packed.numel() == q.absmax.numel() == q.blocks == q.count == 0
        assert codec.dequantize(q).numel() == q.scales().numel() == 0
        assert codec.quantization_error(torch.zeros(0), q) == (0, 0)


def test_layouts(kernel, same, normal):
    x = normal(96, 130)
    same(codec.quantize(x.T).packed, codec.quantize(x.T.contiguous()).packed)
    parameter = torch.nn.Parameter(x)
    same(codec.quantize(parameter).packed, codec.quantize(x).packed)


def test_threads_do_not_matter(kernel, same, normal):
    x = normal(1_300_001, dtype=torch.bfloat16)
    one, many = codec.quantize(x, threads=1), codec.quantize(x, threads=5)
    same(one.packed, many.packed)
    same(one.absmax, many.absmax)
    same(one.nested_absmax, many.nested_absmax)
    assert one.nested_offset == many.nested_offset


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(FINITE, min_size=1),
    st.sampled_from(codec.BLOCK_SIZES),
    st.sampled_from(DTYPES[::2]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_finite_numbers(kernel, formula, same, values, block_size, dtype):
    x = torch.tensor(values * 9).clamp(-3e38, 3e38).to(dtype)
    q = codec.quantize(x, block_size=block_size, double_quant=False)
    code, absmax = formula.codes(x, block_size)
    same(q.packed, formula.pack(code))
    same(q.absmax, absmax)
    same(codec.dequantize(q, dtype=torch.float32), formula.decode(q))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.zeros(4, dtype=torch.float64), {}),
        (torch.zeros(4, dtype=torch.int32), {}),
        (torch.zeros(4), {"block_size": 48}),
        (torch.zeros(4), {"block_size": 8192}),
    ],
)
def test_refusals(kernel, x, options):
    with pytest.raises(UsageError):
        codec.quantize(x, **options)
