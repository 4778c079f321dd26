"""Adapters of every mixture of experts that transformers has: ours in PEFT."""

import warnings

import peft
import pytest
import torch
import transformers

from loraformat.errors import UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.train import LoraOptions, load
from tests.adapters import moe_models
from tests.train.causal_models import REFUSED
from tests.train.engine.reference import make_batch


def dense_model(folder):
    """The dense float32 model whose weights are those that the bundle's codes stand for."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "dense", dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager",
    ).eval()  # fmt: skip


def bases(folder, model_type):
    """A tiny model as bundle, and dense with the bundle's values."""
    moe_models.make(model_type).save_pretrained(folder / "original")
    convert(folder / "original", folder / "bundle")
    convert(folder / "bundle", folder / "dense", to_format="safetensors", dtype="f32")
    return folder / "bundle"


def opened(bundle, model_type, **options):
    """The model, or None if it is one that is refused, for the reason in the table."""
    if model_type in REFUSED:
        with pytest.raises(UnsupportedError) as refused:
            load(bundle, **options)
        assert refused.value.problem.startswith(REFUSED[model_type][0])
        return None
    return load(bundle, **options).eval()


@pytest.fixture(scope="module", params=moe_models.model_types())
def base(request, tmp_path_factory):
    """A model type, and where its bases are."""
    folder = tmp_path_factory.mktemp(request.param)
    bases(folder, request.param)
    return request.param, folder


def test_what_is_trained_loads_in_peft_and_computes_the_same(base):
    model_type, folder = base
    bundle = folder / "bundle"
    model = opened(bundle, model_type, lora=LoraOptions(rank=4, alpha=8))
    if model is None:
        return
    random = torch.Generator().manual_seed(0)
    with model, torch.no_grad():
        before = moe_models.logits(model)
        for branch in model.branches.values():
            branch.b.copy_(torch.randn(branch.b.shape, generator=random) * 0.1)
        trained = moe_models.logits(model)
        model.save_adapter(folder / "adapter")
    assert (trained - before).abs().max() > 0.02 * before.abs().max()
    dense = dense_model(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = moe_models.logits(peft.PeftModel.from_pretrained(dense, folder / "adapter"))
    torch.testing.assert_close(theirs, trained, atol=1e-4, rtol=0)
    with load(bundle, adapter=folder / "adapter").eval() as again:
        torch.testing.assert_close(moe_models.logits(again), trained, atol=1e-5, rtol=0)


#: What PEFT refuses, or wraps as a linear although its class computes more than a product.
NOT_BY_PEFT = {
    "llama4": ["router"], "llama4_text": ["router"], "phimoe": ["router"],
    "nemotron_h": ["out_proj"], "deepseek_v4": ["o_a_proj"],
}  # fmt: skip


def made_in_peft(folder, model_type, **options):
    """An adapter as PEFT makes it with all-linear, beside its model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False,
        exclude_modules=NOT_BY_PEFT.get(model_type), **options,
    )  # fmt: skip
    model = peft.get_peft_model(dense_model(folder), config).eval()
    model.save_pretrained(folder / "theirs")
    return model


def test_adapters_of_all_linears_compute_as_in_peft(base):
    model_type, folder = base
    bundle, theirs = folder / "bundle", made_in_peft(folder, model_type)
    model = opened(bundle, model_type, adapter=folder / "theirs")
    if model is None:
        return
    with model:
        ours = moe_models.logits(model)
        model.save_adapter(folder / "again")
    torch.testing.assert_close(ours, moe_models.logits(theirs), atol=1e-4, rtol=0)
    again = peft.PeftModel.from_pretrained(dense_model(folder), folder / "again")
    torch.testing.assert_close(moe_models.logits(again), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        ("mixtral", None),
        ("deepseek_v3", None),
        ("gpt_oss", ["router.weight"]),
        ("granitemoe", ["router.weight"]),
    ],
)
@pytest.mark.parametrize("kept", [0, 1 << 30], ids=["recomputed", "kept"])
def test_routers_get_the_gradients_of_peft(model_type, parameters, kept, tmp_path):
    bundle = bases(tmp_path, model_type)
    theirs = made_in_peft(tmp_path, model_type, target_parameters=parameters)
    batch = make_batch(length=8, vocabulary=moe_models.VOCABULARY)
    learned = (batch.labels[:, 1:] >= 0).sum()
    loss = theirs(batch.input_ids, labels=batch.labels, use_cache=False).loss
    (loss * learned).backward()
    wanted = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters() if "lora_" in name
    }  # fmt: skip
    routers = 0
    with load(bundle, adapter=tmp_path / "theirs", activation_memory=kept) as model:
        model.loss(batch).backward()
        for name, parameter in model.trainable().items():
            key = name.replace(".weight.lora_", ".lora_")
            if key in wanted:  # experts have other keys
                routers += ".weight.lora_" in name
                torch.testing.assert_close(parameter.grad, wanted[key], atol=1e-4, rtol=1e-3)
    assert routers
