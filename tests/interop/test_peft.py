"""PEFT trains an adapter on a bundle, and keeps the base as it is."""

import peft
import pytest
import torch

from loraformat.ops.convert.convert import convert


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_one_step_of_training(source, load, tmp_path, architecture):
    convert(source(architecture), tmp_path / "bundle", skip=["*.experts.*"])
    base = load(tmp_path / "bundle", architecture)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = torch.arange(5, 37).view(2, 16)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert any(p.grad.abs().max() > 0 for p in trained)
        optimizer.step()
    assert losses[1] < losses[0]
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            original = before[name.replace(".base_layer", "").removeprefix("base_model.model.")]
            assert torch.equal(parameter.detach(), original.to(parameter.dtype)), name


def test_an_adapter_of_peft_opens_on_the_bundle(source, load, logits, tmp_path):
    convert(source("llama"), tmp_path / "bundle")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load(tmp_path / "bundle"), config).train()
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "bundle"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again.train()), wanted, rtol=0, atol=1e-6)
    assert (wanted - logits(load(tmp_path / "bundle"))).abs().max() > 1e-3
