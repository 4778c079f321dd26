"""P0 and P2: dequantization is bitsandbytes', gradients are those of finite differences."""

import threading

import bitsandbytes
import pytest
import torch

from loraformat.errors import UsageError
from loraformat.train.engine import matmul
from loraformat.train.engine import matrix as matrices
from loraformat.train.engine.buffers import workspace
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear, LoraFactors, frozen_product
from loraformat.train.engine.matrix import DenseMatrix, NF4Matrix, output_tiles
from tests import torch_codec as codec

SHAPES = [(1, 1), (3, 5), (16, 64), (33, 40), (70, 30), (64, 129), (200, 7)]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(matrices, "_TILE", 1024)
    monkeypatch.setattr(matrices, "_FEWEST_ROWS", 16)
    monkeypatch.setattr(matmul, "_BLOCK", 1024)
    monkeypatch.setattr(matmul, "_ALIGNED_ROWS", 16)
    monkeypatch.setattr(matmul, "_DEEP", 32)
    monkeypatch.setattr(matmul, "_FEW", 0)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantized(shape, in_out_layout=False, **options):
    weight = random(*shape)
    codes = codec.quantize(weight, **options)
    whole = codec.dequantize(codes, dtype=torch.float32).view(shape)
    return NF4Matrix(
        codes.codes, shape, in_out_layout=in_out_layout
    ), whole.T if in_out_layout else whole


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("in_out_layout", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_finite_differences(small_tiles, shape, in_out_layout, double_quant):
    matrix, whole = quantized(shape, in_out_layout, double_quant=double_quant)
    x = random(3, whole.shape[1], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_product(x, matrix), x)
    expected = x @ whole.double().T
    torch.testing.assert_close(frozen_product(x, matrix), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_out_layout", [False, True])
def test_plain_weights_of_every_type(small_tiles, dtype, in_out_layout):
    values = random(50, 22).to(dtype)
    matrix = DenseMatrix(values, in_out_layout=in_out_layout)
    whole = (values.T if in_out_layout else values).double()
    x = random(2, 4, whole.shape[1], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_product(x, matrix), x)
    torch.testing.assert_close(frozen_product(x, matrix), x @ whole.T)
    assert torch.equal(values, random(50, 22).to(dtype))


class SquaredSum:
    """A branch that is no pair."""

    def pair(self):
        return None

    def __call__(self, x, y):
        return y + x.sum(-1, keepdim=True) ** 2


@pytest.mark.parametrize("bias", [None, random(33, seed=2)])
def test_a_linear_with_bias_and_branch(small_tiles, bias):
    matrix, whole = quantized((33, 40))
    linear = FrozenLinear(matrix, "q_proj", bias)
    linear.branch = SquaredSum()
    x = random(5, 40, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear, x)
    expected = x @ whole.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(linear(x), expected + x.sum(-1, keepdim=True) ** 2)


@pytest.mark.parametrize("shape", [(32, 64), (48, 128), (96, 192)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_multiplied_is_what_bitsandbytes_decodes(small_tiles, shape, double_quant):
    weight = random(*shape)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double_quant
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    options = {}
    if double_quant:
        options = {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.item()}
    codes = codec.NF4(packed.view(-1), state.absmax, weight.numel(), 64, **options)
    linear = FrozenLinear(NF4Matrix(codes.codes, shape))
    # Each sum is of one weight and zeros.
    assert torch.equal(linear(torch.eye(shape[1])).T, expected)
    assert torch.equal(torch.cat([t.clone() for _, _, t in linear.dense_tiles()]), expected)


def test_factors_of_bfloat16_and_sums_of_float32(small_tiles):
    matrix, whole = quantized((70, 256))
    x = random(9, 256).requires_grad_()
    y = frozen_product(x, matrix, torch.bfloat16)
    y.backward(random(9, 70, seed=1))
    exact = x.detach() @ whole.T
    assert y.dtype == x.grad.dtype == torch.float32
    assert 1e-4 < (y - exact).norm() / exact.norm() < 6e-3
    gradient = random(9, 70, seed=1) @ whole
    assert 1e-4 < (x.grad - gradient).norm() / gradient.norm() < 6e-3


def test_tiles_share_one_buffer_and_cover_all_rows(small_tiles):
    matrix, whole = quantized((70, 30))
    seen, addresses = [], set()
    for start, stop, tile in matrix.tiles(torch.float32):
        assert torch.equal(tile, whole[start:stop])
        seen.append((start, stop))
        addresses.add(tile.data_ptr())
    assert seen == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 70)]
    assert len(addresses) == 1


def test_output_tiles_of_a_weight_by_inputs(small_tiles):
    matrix, whole = quantized((40, 33), in_out_layout=True)
    found = torch.cat([tile.clone() for _, _, tile in output_tiles(matrix)])
    assert torch.equal(found, whole)


def test_one_expert_of_a_stack_in_one_tensor_and_in_parts(small_tiles):
    weight = random(4, 10, 24)
    codes = codec.quantize(weight)
    whole = codec.dequantize(codes, dtype=torch.float32).view(4, 10, 24)
    fused = ExpertStack(
        [[NF4Matrix(codes.codes, (10, 24), offset=240 * e)] for e in range(4)], "up_proj"
    )
    parts = ExpertStack([[DenseMatrix(w[:4]), DenseMatrix(w[4:])] for w in whole], "up_proj")
    x = random(3, 24)
    for expert in range(4):
        torch.testing.assert_close(fused(x, expert), x @ whole[expert].T)
        torch.testing.assert_close(parts(x, expert), x @ whole[expert].T)
        for stack in (fused, parts):
            tiles = list(stack.dense_tiles(expert))
            assert tiles[-1][1] == stack.out_features == 10


@pytest.mark.parametrize("in_out_layout", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_piece_is_computed_by_one_thread(small_tiles, monkeypatch, in_out_layout, threads):
    matrix, whole = quantized((200, 320), in_out_layout)
    plain, workers, torch_threads, blocks = matrix.block, set(), set(), []

    def block(rows, columns, dtype):
        workers.add(threading.get_ident())
        torch_threads.add(torch.get_num_threads())
        blocks.append((rows, columns))
        return plain(rows, columns, dtype)

    monkeypatch.setattr(matrix, "block", block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = random(6, whole.shape[1]).requires_grad_()
        y = frozen_product(x, matrix)
        y.sum().backward()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, x @ whole.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, whole.sum(0).expand(6, -1), rtol=1e-4, atol=1e-4)
    covered = torch.zeros(200, 320)
    for rows, columns in blocks:
        covered[slice(*rows), slice(*columns)] += 1
    assert (covered == 2).all()  # forward and backward
    assert len(workers) <= threads and torch_threads == {1}


def test_without_gradients_and_with_tensors_of_inference_mode(small_tiles):
    matrix, whole = quantized((200, 320))
    parameter = random(320).requires_grad_()
    with torch.inference_mode():
        x = random(4, 320)
        found = frozen_product(x, matrix)
        assert found.is_inference()
        torch.testing.assert_close(found, x @ whole.T, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not frozen_product(parameter[None], matrix).requires_grad


@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_few_tokens_are_multiplied_by_what_is_not_written(
    small_tiles, monkeypatch, tokens, dtype
):
    matrix, whole = quantized((200, 320))
    plain, decoded = matrix.block, []

    def block(*place):
        decoded.append(place)
        return plain(*place)

    monkeypatch.setattr(matrix, "block", block)
    x = random(1, tokens, 320).to(dtype)
    exact = x.double() @ whole.to(dtype).double().T
    y = frozen_product(x, matrix, dtype)
    assert y.dtype == dtype and y.shape == (1, tokens, 200)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert (y.double() - exact).norm() < bound * exact.norm()
    assert bool(decoded) == (tokens == 5)


def test_an_error_in_a_piece_is_that_of_the_product(small_tiles, monkeypatch):
    matrix, _ = quantized((200, 320))
    codes = codec.quantize(random(100, 320))  # too short for the matrix
    monkeypatch.setattr(matrix, "codes", codes.codes)
    with pytest.raises(UsageError, match="range"):
        frozen_product(random(5, 320), matrix)


@pytest.mark.parametrize("onednn", [True, False])
def test_an_empty_batch_of_tokens(small_tiles, monkeypatch, onednn):
    """As an expert gets that no token was sent to."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(matmul, "_prefers_onednn", lambda: onednn and there)
    matrix, _ = quantized((16, 64))
    x, a, b = torch.empty(0, 64), random(4, 64), random(16, 4)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    for pair in (None, LoraFactors(a, b, 2.0)):
        x.grad = None
        y = frozen_product(x, matrix, pair=pair)
        y.sum().backward()
        assert y.shape == (0, 16) and x.grad.shape == (0, 64)
    assert not a.grad.any() and not b.grad.any()


def test_a_weight_that_is_not_there_says_so():
    linear = FrozenLinear(DenseMatrix(torch.ones(2, 3)), "lm_head")
    assert linear.weight.shape == (2, 3) and linear.weight.dtype == torch.float32
    for compute in (
        lambda: linear.weight @ torch.ones(3),
        lambda: torch.ones(1, 3) @ linear.weight.T,
        lambda: torch.nn.functional.linear(torch.ones(1, 3), linear.weight),
        lambda: linear.weight * 2,
    ):
        with pytest.raises(Exception, match=r"lm_head|PlaceholderWeight"):
            compute()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [40, 9000])
def test_products_after_those_of_inference(stored, rows):
    """Buffers that were made in inference mode are written again outside of it."""
    found = []

    def work():  # in a thread that has no buffers yet
        x = random(4, rows).bfloat16()
        matrix = DenseMatrix(random(rows, 64, seed=1).to(stored))
        for inference in (True, False):
            with torch.inference_mode(inference):
                found.append(matmul.multiply_transposed(x, matrix, torch.float32))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 2 and torch.equal(*found)


def test_a_default_device_is_not_that_of_buffers():
    matrix, whole = quantized((33, 40))
    x = random(5, 40)
    workspace.forget("block")
    with torch.device("meta"):
        found = frozen_product(x, matrix)
    torch.testing.assert_close(found, x @ whole.T)


def test_a_product_may_be_changed_in_place():
    matrix, _ = quantized((33, 40))
    x = random(2, 5, 40, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_product(x, matrix).mul_(2), x)
