"""P5: samples that share a row do not see each other, or the batch is refused."""

import pytest
import torch

from loraformat.errors import UnsupportedError
from tests.train.engine.reference import gradients, make_batch, one_row, relative

LENGTHS = (9, 20, 5)  # the windows of mistral and gemma are 8


@pytest.mark.parametrize(
    "architecture",
    ["llama", "mistral-window", "gemma2", "gemma3_text-pattern", "gpt2", "phi3", "qwen3_moe"],
)
def test_packed_is_unpacked(opened, attach, architecture):
    model, _ = opened(architecture)
    attach(model)
    alone = [make_batch(rows=1, length=n, seed=n) for n in LENGTHS]
    losses = []
    for batch in alone:
        loss = model.loss(batch)
        loss.backward()
        losses.append(loss.detach())
    expected = gradients(model)
    model.zero_grad()
    packed = model.loss(one_row(alone, padding=4))
    packed.backward()
    assert relative(packed.detach(), sum(losses)) < 1e-6
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("architecture", ["bloom", "lfm2"])
def test_a_model_that_would_mix_samples_refuses_packed_rows(opened, architecture):
    model, _ = opened(architecture)
    alone = [make_batch(rows=1, length=n, seed=n) for n in LENGTHS]
    with torch.no_grad():
        model.loss(alone[0])
        with pytest.raises(UnsupportedError, match="cannot be packed into one row") as caught:
            model.loss(one_row(alone))
    assert caught.value.hint


def test_padding_at_the_end_of_a_row_changes_nothing(opened):
    model, _ = opened("llama")
    batch = make_batch(rows=1)
    with torch.no_grad():
        assert relative(model.loss(one_row([batch], padding=9)), model.loss(batch)) < 1e-6
