"""What a GPU would do, on the CPU: codes that travel, and that torch decodes to the same bits."""

import pytest
import torch

from loraformat.train import opening
from loraformat.train.engine import device
from loraformat.train.engine.device import DeviceMatrix, decode, place_on
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import DenseMatrix, NF4Matrix
from loraformat.train.engine.stored_weights import StoredWeights
from tests import torch_codec as codec
from tests.train.engine.reference import gradients, make_batch

CPU = torch.device("cpu")


def quantized(count, **options):
    return codec.quantize(torch.randn(count, generator=torch.Generator().manual_seed(0)), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"double_quant": False}, {"block_size": 32}, {"block_size": 4096}]
)
@pytest.mark.parametrize("count", [1, 63, 64, 4096, 33000])
def test_torch_decodes_the_bits_of_the_kernels(count, options, dtype):
    codes = quantized(count, **options)
    nested = codes.nested_absmax, codes.nested_offset
    found = decode(codes.packed, codes.absmax, *nested, codes.block_size, dtype)
    assert torch.equal(found[:count], codec.dequantize(codes, dtype=dtype))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stack_that_begins_anywhere_in_a_block(monkeypatch, resident, double_quant):
    monkeypatch.setattr(device, "_TILE", 1000)
    rows, columns, experts = 75, 70, 7  # 5250 elements: no block and no group begins with one
    codes = quantized(rows * columns * experts, double_quant=double_quant)
    whole = codec.dequantize(codes, dtype=torch.float32).view(experts, rows, columns)
    for expert in range(experts):
        host = NF4Matrix(codes.codes, (rows, columns), offset=expert * rows * columns)
        matrix = DeviceMatrix(host, CPU, resident=resident)
        tiles = list(matrix.tiles(torch.float32))
        assert len(tiles) > 3
        assert torch.equal(torch.cat([tile for _, _, tile in tiles]), whole[expert])


@pytest.mark.parametrize("resident", [True, False])
def test_plain_numbers(resident):
    values = torch.randn(9, 5).bfloat16()
    matrix = DeviceMatrix(DenseMatrix(values, in_out_layout=True), CPU, resident=resident)
    ((start, stop, tile),) = matrix.tiles(torch.float32)
    assert (start, stop, matrix.in_out_layout) == (0, 9, True)
    assert torch.equal(tile, values.float())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("budget", [0, 40_000, 10**9])
def test_a_placed_model_computes_the_same(opened, attach, architecture, budget):
    model, _ = opened(architecture)
    attach(model)
    model.loss(make_batch()).backward()
    expected = gradients(model)
    weights = StoredWeights(model.bundle)
    config = model.bundle.checkpoint.config
    placed, assembly = opening._build(model.bundle.folder.path, weights, config, torch.float32)
    used = assembly.used
    resident = place_on(placed, used, weights, CPU, budget)
    sizes = {name: sum(e - b for n in used[name] for _, b, e in weights.spans(n)) for name in used}
    frozen = [name for name, module in placed.named_modules() if _is_frozen(module)]
    assert sum(sizes[name] for name in resident) <= budget
    assert resident == set(frozen) if budget == 10**9 else len(resident) < len(frozen)
    for name in frozen:
        module, original = placed.get_submodule(name), model.base.get_submodule(name)
        for part in ("matrix", "experts"):
            if hasattr(module, part):
                setattr(original, part, getattr(module, part))
    model.zero_grad()
    model.loss(make_batch()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def _is_frozen(module):
    return isinstance(module, FrozenLinear | ExpertStack)
