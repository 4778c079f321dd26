"""With bfloat16 a model computes as transformers' own does in it, and not worse."""

import pytest
import torch

from loraformat.train import LoraOptions, load
from loraformat.train.engine import matmul
from loraformat.train.engine.cross_entropy import HeadRule, frozen_head_loss
from loraformat.train.engine.linear import FrozenLinear, LoraFactors, frozen_product
from loraformat.train.engine.matrix import DenseMatrix, NF4Matrix
from tests import torch_codec as codec
from tests.train.engine.reference import (
    dense_loss,
    factors_of,
    gradients,
    make_batch,
    merged_weights,
    relative,
)


def gradients_of_dense(model, dense, dtype):
    """Loss and gradients of the factors, of a dense model in a type."""
    factors = factors_of(model)
    weights = merged_weights(model, dense, factors)[1]
    loss = dense_loss(dense.to(dtype), make_batch(), {n: w.to(dtype) for n, w in weights.items()})
    loss.backward()
    dense.float()
    return loss.detach().float(), {name: (a.grad, b.grad) for name, (a, b) in factors.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "mixtral"])
def test_gradients_are_as_near_to_float32_as_those_of_a_dense_bfloat16_model(
    opened, attach, architecture
):
    model, dense = opened(architecture, compute_dtype=torch.bfloat16)
    attach(model)
    loss = model.loss(make_batch())
    loss.backward()
    exact, wanted = gradients_of_dense(model, dense, torch.float32)
    rounded, theirs = gradients_of_dense(model, dense, torch.bfloat16)
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), exact) < max(2e-3, 2 * relative(rounded, exact))
    found, ours, dense_error = gradients(model), [], []
    for name, pair in wanted.items():
        for which, gradient, other in zip("ab", pair, theirs[name], strict=True):
            mine = found[f"{name}.branch.{which}"]
            assert mine.dtype == torch.float32
            ours.append(relative(mine, gradient))
            dense_error.append(relative(other, gradient))
    assert 1e-4 < sum(ours) / len(ours) < 1.5 * sum(dense_error) / len(dense_error)


def test_hidden_states_are_bfloat16_and_what_is_trained_is_float32(bundle_of):
    with load(bundle_of("llama"), lora=LoraOptions(rank=2), compute_dtype=torch.bfloat16) as model:
        seen = []
        model.base.model.layers[1].register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].dtype)
        )
        model.loss(make_batch()).backward()
        assert set(seen) == {torch.bfloat16}
        for parameter in model.trainable().values():
            assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_sums_over_tiles_are_not_rounded_with_every_tile(monkeypatch):
    """Over 128 parts: sums in bfloat16 would be off by some 2 %."""
    monkeypatch.setattr(matmul, "_DEEP", 64)
    weight = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))
    matrix = NF4Matrix(codec.quantize(weight).codes, (8192, 64))
    assert len(list(matmul._steps(matrix))) == 128
    x = torch.randn(40, 64, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.randn(40, 8192).bfloat16()
    frozen_product(x, matrix, torch.bfloat16).backward(gradient)
    whole = (
        codec.dequantize(codec.Quantized(matrix.codes), dtype=torch.float32)
        .view(8192, 64)
        .bfloat16()
    )
    assert relative(x.grad.float(), gradient.float() @ whole.float()) < 4e-3


def test_the_factor_of_a_loss_is_not_rounded():
    """1/700 in bfloat16 would make every gradient smaller by 0.13 %."""
    chance = torch.Generator().manual_seed(0)
    head = FrozenLinear(
        DenseMatrix(torch.randn(50, 64, generator=chance).bfloat16()), dtype=torch.bfloat16
    )
    hidden = torch.randn(40, 64, generator=chance).bfloat16().requires_grad_()
    targets = torch.randint(50, (40,), generator=chance)
    (whole,) = torch.autograd.grad(frozen_head_loss(hidden, targets, head, HeadRule()), hidden)
    loss = frozen_head_loss(hidden, targets, head, HeadRule()) / 700
    (found,) = torch.autograd.grad(loss, hidden)
    scale = (found.double() * whole.double()).sum() / whole.double().square().sum()
    assert abs(scale * 700 - 1) < 5e-4


@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_and_even_numbers_of_rows(rows, dtype):
    chance = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 128, generator=chance)
    matrix = NF4Matrix(codec.quantize(weight).codes, (48, 128))
    whole = codec.dequantize(codec.Quantized(matrix.codes), dtype=torch.float32).view(48, 128)
    a, b = (torch.randn(s, generator=chance).requires_grad_() for s in ((4, 128), (48, 4)))
    x = torch.randn(rows, 128, generator=chance).to(dtype).requires_grad_()
    y = frozen_product(x, matrix, dtype, pair=LoraFactors(a, b, 0.5))
    y.backward(torch.ones_like(y))
    found = [y.detach(), x.grad, a.grad, b.grad]
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    exact = wide[0] @ whole.double().T + 0.5 * wide[0] @ wide[1].T @ wide[2].T
    exact.backward(torch.ones_like(exact))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, wanted in zip(found, [exact.detach(), *(t.grad for t in wide)], strict=True):
        assert relative(mine.double(), wanted) < bound
