"""Perplexity: the formula, its independence of batching, and what is refused."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from loraformat.demo import HELDOUT, SMALL_MODEL
from loraformat.demo.perplexity import Perplexity, load, perplexity_of
from loraformat.errors import InputError, MissingDependencyError

torch = import_module("torch")
transformers = import_module("transformers")

TEXT = HELDOUT.read_bytes().decode()[:2000]


class Letters:
    """A tokenizer with one token per letter and, if wanted, a BOS."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 16 for c in text]}


class Indifferent(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A model of 16 tokens that finds all of them equally likely."""

    device = torch.device("cpu")

    def forward(self, input_ids: Any, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 16))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(SMALL_MODEL)


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(window: int) -> None:
    found = perplexity_of(Indifferent(), Letters(0), "abcdefg", window=window)
    assert found.perplexity == pytest.approx(16)
    assert found.bits_per_byte == pytest.approx(4)
    assert (found.tokens, found.bytes) == (7, 7)


def test_without_bos_the_first_token_is_not_predicted() -> None:
    assert perplexity_of(Indifferent(), Letters(None), "abcdefg").tokens == 6


def test_it_is_the_mean_loss_of_transformers_when_one_window_holds_all(
    loaded: tuple[Any, Any],
) -> None:
    model, tokenizer = loaded
    ids = tokenizer(TEXT[:1000], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert perplexity_of(model, tokenizer, TEXT[:1000]).nats_per_token == pytest.approx(expected)


def test_batching_does_not_change_it(loaded: tuple[Any, Any]) -> None:
    one, many = (perplexity_of(*loaded, TEXT, window=128, batch_size=n) for n in (1, 4))
    assert one.tokens == many.tokens
    assert one.nats_per_token == pytest.approx(many.nats_per_token, rel=1e-6)


def test_a_longer_context_helps(loaded: tuple[Any, Any]) -> None:
    short, long = (perplexity_of(*loaded, TEXT, window=n) for n in (16, 512))
    assert long.perplexity < short.perplexity


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match="no tokens to predict"):
        perplexity_of(Indifferent(), Letters(0), "")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"transformers is not installed.*pip install"):
        load(SMALL_MODEL)


def test_four_bit_weights_are_left_as_they_are(loaded: tuple[Any, Any]) -> None:
    import_module("bitsandbytes")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        SMALL_MODEL,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    found = perplexity_of(quantized, loaded[1], TEXT)
    after = quantized.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    plain = perplexity_of(*loaded, TEXT)
    assert 0 < abs(found.nats_per_token - plain.nats_per_token) < 0.1


def test_properties_follow_from_the_fields() -> None:
    result = Perplexity(nats_per_token=1.0, tokens=10, bytes=20)
    assert result.perplexity == math.e
    assert result.bits_per_byte == pytest.approx(0.5 / math.log(2))
