"""Weights in segments: each is, bit for bit, what its matrix is by itself."""

import numpy
import pytest

from loraformat.errors import NonFiniteError
from loraformat.model.checkpoint import DenseTensor
from loraformat.nf4 import codec
from loraformat.nf4.segments import NF4Stack, stacked
from loraformat.ops.encoding.encode import QuantizationPolicy, quantized
from loraformat.tensors.arrays import array_bytes, numpy_dtype

#: Whole blocks; blocks that would cross; odd; a second level with a tail; many; one.
SHAPES = [(3, 8, 64), (3, 6, 32), (2, 5, 13), (2, 257, 64), (64, 4, 32), (1, 3, 40), (2, 2, 3, 32)]


def stack_of(shape, dtype="F32"):
    values = numpy.random.default_rng(0).standard_normal(shape, numpy.float32)
    larger = numpy.linspace(0.1, 3, shape[0], dtype=numpy.float32)  # from one to the next
    values *= larger.reshape(-1, *[1] * len(shape[1:]))
    return values.astype(numpy_dtype(dtype))


def dense(values, dtype="F32", name="model.layers.0.mlp.experts.gate_up_proj"):
    return DenseTensor(name, dtype, values.shape, lambda: array_bytes(values))


def by_rows(values, dtype="F32"):
    """The same, computed row by row: never there as a whole."""
    rows = values.reshape(-1, values.shape[-1])
    open_rows = lambda: lambda start, stop: rows[start:stop]  # noqa: E731
    return DenseTensor.by_rows("x.layers.0.experts.w", dtype, values.shape, open_rows)


@pytest.mark.parametrize("make", [dense, by_rows])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_segment_is_its_matrix_alone(kernel, shape, double_quant, make):
    values = stack_of(shape)
    policy = QuantizationPolicy(64, double_quant, stacks=True)
    tensor = quantized(make(values), policy, None)
    segments = tensor.segment_codes(tensor.load())
    matrices = values.reshape(-1, *shape[-2:])
    assert len(segments) == len(matrices) == tensor.segments
    for segment, matrix in zip(segments, matrices, strict=True):
        alone = codec.quantize(matrix, double_quant=double_quant)
        assert numpy.array_equal(segment.packed, alone.packed)
        assert numpy.array_equal(segment.absmax, alone.absmax)
        assert segment.nested_offset == alone.nested_offset
        if double_quant:
            assert numpy.array_equal(segment.nested_absmax, alone.nested_absmax)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_of_reading_gives_the_same_bits(kernel, shape, dtype):
    values = stack_of(shape, dtype)
    tensor = quantized(dense(values, dtype), QuantizationPolicy(stacks=True), None)
    whole = tensor.dequantize().reshape(tensor.matrix_shape)
    alone = [codec.dequantize(codec.quantize(matrix), dtype=numpy_dtype(dtype))
             for matrix in values.reshape(-1, *shape[-2:])]  # fmt: skip
    assert numpy.array_equal(whole.reshape(-1).view("u1"), numpy.concatenate(alone).view("u1"))
    height = whole.shape[0]
    read = tensor.row_reader()
    for start, stop in [(0, height), (0, 1), (height - 1, height), (1, height - 1), (2, 2)]:
        assert numpy.array_equal(read(start, stop).view("u1"), whole[start:stop].view("u1"))
    found = numpy.concatenate([read(row, row + 1) for row in range(height)])
    assert numpy.array_equal(found.view("u1"), whole.view("u1"))


def test_the_recorded_error_is_that_of_all_segments():
    values = stack_of((3, 6, 32))
    parts = quantized(dense(values), QuantizationPolicy(stacks=True), None).load()
    tensor = quantized(dense(values), QuantizationPolicy(stacks=True), None)
    wanted = numpy.linalg.norm(tensor.dequantize() - values) / numpy.linalg.norm(values)
    assert parts.relative_rms_error == pytest.approx(wanted, rel=1e-2)


def test_a_number_that_is_not_finite_is_named():
    values = stack_of((3, 6, 32))
    values[2, 1, 5] = numpy.inf
    tensor = quantized(dense(values), QuantizationPolicy(stacks=True), None)
    with pytest.raises(NonFiniteError, match="gate_up_proj"):
        tensor.load()


def test_one_segment_is_not_copied():
    one = codec.quantize(stack_of((3, 40)))
    assert numpy.shares_memory(stacked(iter([one]), 1).packed, one.packed)


def test_segments_are_views():
    stack = stacked((codec.quantize(matrix) for matrix in stack_of((3, 6, 32))), 3)
    assert isinstance(stack, NF4Stack)
    assert all(numpy.shares_memory(one.packed, stack.packed) for one in stack.segments())


def test_only_stacks_of_experts_are_chosen():
    policy = QuantizationPolicy(stacks=True)
    values = stack_of((3, 6, 32))
    names = {
        "model.layers.0.mlp.experts.down_proj": True,
        "model.layers.0.block_sparse_moe.output_linear.weight": True,
        "model.layers.0.mlp.shared_experts.down_proj": True,
        "model.layers.0.mamba.conv1d.weight": False,
        "model.layers.0.mlp.experts.gate_up_proj_bias": False,
        "experts.down_proj": False,
    }
    assert {name: policy.selects(dense(values, name=name)) for name in names} == names
    assert not any(QuantizationPolicy().selects(dense(values, name=name)) for name in names)
    kept = QuantizationPolicy(stacks=True, skip=["*.experts.*"])
    assert not kept.selects(dense(values))
