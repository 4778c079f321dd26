"""Where branches begin: PEFT's distributions, and the base's own directions."""

import peft
import pytest
import torch
from dense_sites import plain_site
from torch import nn

from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.model.checkpoint import Checkpoint, Provenance
from loraformat.testing.models import dense
from loraformat.testing.models import nf4 as nf4_tensor
from loraformat.train import LoraOptions
from loraformat.train.lora.branch import branch_of
from loraformat.train.lora.initialise import initial
from tests import torch_codec as codec

SHAPE = (48, 40)


def weight(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def delta(factors, scaling=1.0):
    product = factors.b @ factors.a
    if factors.fixed is not None:
        product = product - factors.fixed[1] @ factors.fixed[0]
    return scaling * product


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("shape", [SHAPE, (3, *SHAPE)])
def test_the_model_begins_as_the_base(init, shape):
    site = plain_site("up_proj", weight(shape=shape))
    factors = initial(site, 4, LoraOptions(init=init, alpha=6))
    assert factors.a.shape == (*shape[:-2], 4, 40) and factors.b.shape == (*shape[:-1], 4)
    assert delta(factors).abs().max() <= 1e-6
    assert factors.a.abs().max() > 0


def test_an_embedding_begins_as_peft_s():
    site = plain_site("embed_tokens", weight(), kind="embedding")
    factors = initial(site, 4, LoraOptions(init="gaussian"))
    assert not factors.a.any()
    assert abs(float(factors.b.std()) - 1) < 0.2


def test_distributions_are_peft_s():
    site = plain_site("up_proj", torch.empty(8, 400))
    kaiming = initial(site, 64, LoraOptions()).a
    theirs = torch.empty(64, 400)
    nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert kaiming.abs().max() <= 400**-0.5
    assert abs(float(kaiming.std() / theirs.std()) - 1) < 0.02
    gaussian = initial(site, 64, LoraOptions(init="gaussian")).a
    assert abs(float(gaussian.std()) * 64 - 1) < 0.02


def test_orthogonal_factors_have_peft_s_size_and_both_learn_at_once():
    site = plain_site("up_proj", torch.empty(400, 600))
    ours = initial(site, 8, LoraOptions(init="orthogonal"))
    layer = nn.Sequential(nn.Linear(600, 400, bias=False))
    config = peft.LoraConfig(r=8, init_lora_weights="orthogonal", target_modules=["0"])
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    for mine, other in ((ours.a, theirs.lora_A), (ours.b, theirs.lora_B)):
        assert abs(float(mine.norm() / other["default"].weight.norm()) - 1) < 0.1
    with pytest.raises(UsageError, match="halves the rank"):
        initial(site, 3, LoraOptions(init="orthogonal"))


def test_a_module_begins_alike_whatever_else_is_trained():
    options = LoraOptions(seed=5)
    q, v = (initial(plain_site(name, weight()), 4, options).a for name in ("q", "v"))
    assert not torch.equal(q, v)
    assert torch.equal(v, initial(plain_site("v", weight()), 4, options).a)
    assert not torch.equal(v, initial(plain_site("v", weight()), 4, LoraOptions(seed=6)).a)


@pytest.mark.parametrize("alpha", [4, 10])
def test_pissa_begins_with_peft_s_product(alpha):
    matrix = weight()
    factors = initial(plain_site("0", matrix), 4, LoraOptions(init="pissa", alpha=alpha))
    layer = nn.Sequential(nn.Linear(40, 48, bias=False))
    layer[0].weight.data = matrix.clone()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert (factors.b @ factors.a - product).norm() <= 1e-3 * product.norm()


def test_pissa_trains_the_residual_base_and_leaves_the_stored_one():
    matrix = weight()
    site = plain_site("up_proj", matrix)
    branch = branch_of(
        site, initial(site, 4, LoraOptions(init="pissa", alpha=6)), 1.5,
        dropout=0.0, dora=False, collecting=False,
    )  # fmt: skip
    with torch.no_grad():
        branch.a.mul_(1.5)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(3))
    residual = matrix - 1.5 * branch.fixed_b @ branch.fixed_a
    wanted = x @ (residual + 1.5 * branch.b @ branch.a).T
    assert torch.allclose(branch(x, x @ matrix.T), wanted, atol=1e-5)
    a, b = branch.effective()
    assert a.shape[0] == branch.rank == 8
    assert torch.allclose(x @ (matrix + 1.5 * b @ a).T, wanted, atol=1e-5)


def quantized(matrix):
    return codec.dequantize(codec.quantize(matrix)).view(matrix.shape)


def original(**tensors):
    named = {name.replace("_weight", ".weight"): tensor for name, tensor in tensors.items()}
    lazy = {
        name: tensor if not isinstance(tensor, torch.Tensor) else dense(name, tensor)
        for name, tensor in named.items()
    }
    return Checkpoint(path="original", provenance=Provenance("test"), tensors=lazy)


@pytest.mark.parametrize("transposed", [False, True])
def test_loftq_takes_back_as_much_of_the_error_as_the_rank_can(transposed):
    matrix = weight()
    stored = quantized(matrix)
    site = plain_site("up_proj", stored, quantized=True, transposed=transposed)
    model = original(up_proj_weight=matrix.T.contiguous() if transposed else matrix)
    factors = initial(site, 8, LoraOptions(init="loftq", alpha=4), model)
    lost = matrix - stored
    left = lost - delta(factors, 0.5)
    best = torch.linalg.svdvals(lost)[8:].norm()
    assert left.norm() <= 1.002 * best < 0.9 * lost.norm()


def test_loftq_begins_what_is_not_quantized_as_usual():
    options, site = LoraOptions(init="loftq"), plain_site("up_proj", weight())
    assert torch.equal(initial(site, 4, options).a, initial(site, 4, LoraOptions()).a)
    exact = plain_site("up_proj", torch.zeros(SHAPE), quantized=True)
    model = original(up_proj_weight=torch.zeros(SHAPE))
    assert initial(exact, 4, options, model).a.abs().max() > 0  # no error: nothing to begin with


def test_loftq_needs_the_model_that_was_quantized():
    site, options = plain_site("up_proj", weight(), quantized=True), LoraOptions(init="loftq")
    with pytest.raises(UsageError, match="needs the model that was quantized"):
        initial(site, 4, options)
    for wrong, problem in (
        ({"other_weight": weight()}, "is not there"),
        ({"up_proj_weight": weight(shape=(40, 48))}, r"is \[40, 48\], wanted \[48, 40\]"),
        ({"up_proj_weight": nf4_tensor("up_proj.weight", weight())}, "is quantized"),
        ({"up_proj_weight": weight(seed=1)}, r"not the weight that was quantized.*14\d%"),
    ):
        with pytest.raises(InputError, match=problem):
            initial(site, 4, options, original(**wrong))
    stack = plain_site("experts.up_proj", weight(shape=(3, *SHAPE)), quantized=True)
    with pytest.raises(UnsupportedError, match="experts"):
        initial(stack, 4, options, original())


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_rank_above_the_weight_s_is_refused(init):
    site = plain_site("up_proj", weight(), quantized=True)
    with pytest.raises(UsageError, match="40 principal directions, not 41"):
        initial(site, 41, LoraOptions(init=init), original(up_proj_weight=weight()))


def test_a_weight_of_zeros_has_no_principal_directions():
    with pytest.raises(InputError, match="is zero"):
        initial(plain_site("up_proj", torch.zeros(SHAPE)), 4, LoraOptions(init="pissa"))


def test_a_weight_that_is_not_finite_is_named():
    broken = weight()
    broken[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"up_proj\.weight has no singular values"):
        initial(plain_site("up_proj", broken), 4, LoraOptions(init="pissa"))
    site = plain_site("up_proj", weight(), quantized=True)
    with pytest.raises(InputError, match=r"up_proj\.weight has no singular values"):
        initial(site, 4, LoraOptions(init="loftq"), original(up_proj_weight=broken))
