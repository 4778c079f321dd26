"""A branch computes what PEFT computes, and its gradients are PEFT's.

Ours are trained on dense layers; PEFT loads what was saved. Then logits, and the gradient of
every factor, must agree: branch, writer and scaling are held to PEFT together.
"""

import peft
import pytest
import torch
from dense_sites import sites_of
from tiny_bases import load_dense, tokens

from loraformat.bundle.reader import open_bundle
from loraformat.train import LoraOptions
from loraformat.train.lora.branches import attach, trainable
from loraformat.train.lora.trained_adapter import save_adapter

CASES = {
    "plain": ("llama", {"alpha": 6}),
    "biases": ("qwen2", {"alpha": 6}),
    "scaling-1": ("llama", {}),
    "rslora": ("llama", {"rslora": True, "alpha": 3}),
    "ranks": ("llama", {"alpha": 6, "ranks": {"q_proj": 2, "layers.1.mlp.*": 3}}),
    "rslora-ranks": ("llama", {"rslora": True, "ranks": {"self_attn.*": 2, "v_proj": 3}}),
    "orthogonal": ("llama", {"init": "orthogonal"}),
    "dora": ("llama", {"dora": True, "alpha": 6}),
    "dora-biases": ("qwen2", {"dora": True}),
    "dora-everywhere": ("gemma3", {"dora": True, "embeddings": True}),
    "dora-head": ("llama", {"dora": True, "embeddings": True, "head": True, "alpha": 8}),
    "embeddings-head": ("llama", {"embeddings": True, "head": True, "alpha": 8}),
    "tied-embeddings": ("llama-tied", {"embeddings": True}),
    "tied-head": ("llama-tied", {"head": True}),
    "scaled-embeddings": ("gemma3", {"embeddings": True, "alpha": 2}),
    "conv1d": ("gpt2", {"alpha": 6}),
    "conv1d-dora": ("gpt2", {"dora": True}),
    "experts": ("mixtral", {"alpha": 6}),
    "one-stack": ("mixtral", {"targets": ("experts.down_proj", "q_proj"), "alpha": 2}),
    "pissa": ("llama", {"init": "pissa", "alpha": 6}),
    "pissa-dora": ("llama", {"init": "pissa", "dora": True}),
    "pissa-conv1d": ("gpt2", {"init": "pissa"}),
    "pissa-experts": ("mixtral", {"init": "pissa", "alpha": 2}),
}


def stirred(branches, size=0.05):
    """Move all factors to where none of them is special."""
    random = torch.Generator().manual_seed(1)
    for branch in branches.values():
        for parameter in branch.named().values():
            with torch.no_grad():
                moved = torch.randn(parameter.shape, generator=random) * size
                parameter.add_(moved * (1 if parameter.ndim > 1 else parameter))


def loss_of(model, ids):
    logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return logits, losses.sum()


def peft_gradient(model, branch, name, key):
    """PEFT's gradient of a factor, in the shape and for the scaling of ours."""
    site = branch.target
    if site.kind != "experts":
        leaf = key.replace(".weight", ".default.weight") if ".weight" in key else f"{key}.default"
        if key == "lora_magnitude_vector":
            leaf += ".weight"
        module = model.get_submodule(f"base_model.model.{name}")
        return model.get_parameter(f"base_model.model.{name}.{leaf}").grad, module.scaling
    home, _, which = name.rpartition(".")
    module = model.get_submodule(f"base_model.model.{home}")
    while module.parameter_name != which:
        module = module.base_layer
    gradient = module.get_parameter(key.replace(".weight", ".default.weight")).grad
    if "lora_A" in key:
        gradient = gradient.reshape(site.experts, -1, gradient.shape[-1])
    else:
        gradient = gradient.reshape(len(gradient), -1, site.experts).permute(2, 0, 1)
    return gradient, module.scaling


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_peft_s(case, base, tmp_path):
    name, options = CASES[case]
    options = LoraOptions(**{"rank": 4, "statistics": False, **options})
    model, ids = load_dense(base(name).dense).requires_grad_(False), tokens()
    branches = attach(sites_of(model), options)
    stirred(branches)
    logits, loss = loss_of(model, ids)
    loss.backward()
    with open_bundle(base(name).bundle) as bundle:
        save_adapter(branches, bundle, tmp_path / "adapter", options=options)

    theirs = peft.PeftModel.from_pretrained(
        load_dense(base(name).dense), tmp_path / "adapter", is_trainable=True
    )
    plain = load_dense(base(name).dense)(input_ids=ids).logits
    their_logits, their_loss = loss_of(theirs, ids)
    their_loss.backward()
    effect = (their_logits - plain).abs().max()
    assert effect > 0.01  # else nothing was tested
    assert (logits - their_logits).abs().max() <= 1e-5 * max(1, their_logits.abs().max())
    assert len(trainable(branches)) == sum(len(branch.named()) for branch in branches.values())
    for module, branch in branches.items():
        for key, parameter in branch.named().items():
            gradient, scalings = peft_gradient(theirs, branch, module, key)
            if "lora_B" in key or "embedding_B" in key:  # PEFT's B may hold the scaling
                gradient = gradient[..., : branch.a.shape[-2]] * branch.scaling
                gradient = gradient / scalings["default"]
            elif "magnitude" not in key:
                gradient = gradient[..., : branch.a.shape[-2], :]
            error = (parameter.grad - gradient).norm() / gradient.norm().clamp(min=1e-3)
            assert error <= 2e-5, (module, key)
