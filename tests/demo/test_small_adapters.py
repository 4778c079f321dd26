"""The shipped adapters are those their record describes, small, and really trained."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import loraformat
from loraformat.demo import ADAPTERS, SMALL_ADAPTERS, SMALL_MODEL
from loraformat.demo.perplexity import perplexity_of
from loraformat.demo.texts import KINDS, heldout

RECORD: dict[str, Any] = json.loads((SMALL_ADAPTERS / "training_record.json").read_text())
RANKS = {"manual": 24, "tests": 16}
LINEARS = 7 * 3


def held_out(name: str, kind: str, which: str) -> float:
    found: float = RECORD["adapters"][name]["held_out"][kind][which]["perplexity"]
    return found


def test_together_with_their_texts_they_are_at_most_a_megabyte_and_a_half() -> None:
    files = [path for path in SMALL_ADAPTERS.rglob("*") if path.is_file()]
    texts = sum(len(heldout(kind).encode()) for kind in ("manual", "tests"))
    assert sum(path.stat().st_size for path in files) + texts <= 1_500_000


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_files_are_those_of_the_record(name: str) -> None:
    assert {path.name for path in ADAPTERS[name].iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    content = (ADAPTERS[name] / "adapter_model.safetensors").read_bytes()
    recorded = RECORD["adapters"][name]["weights"]
    assert recorded == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_linear_has_a_pair_in_bfloat16(name: str) -> None:
    with safe_open(ADAPTERS[name] / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert len(tensors) == 2 * LINEARS
        assert {tensor.get_dtype() for tensor in tensors.values()} == {"BF16"}
        ranks = {tensors[key].get_shape()[0] for key in tensors if ".lora_A." in key}
    assert ranks == {RANKS[name]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_about_these_texts(kind: str) -> None:
    digest = hashlib.sha256(heldout(kind).encode()).hexdigest()
    assert {r["held_out"][kind]["sha256"] for r in RECORD["adapters"].values()} == {digest}


def test_the_record_is_about_this_base() -> None:
    content = (SMALL_MODEL / "model.safetensors").read_bytes()
    assert RECORD["base"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_each_has_learned_its_own_text_and_spoils_no_other() -> None:
    for name, other in (("manual", "tests"), ("tests", "manual")):
        assert held_out(name, name, "adapter") < 0.9 * held_out(name, name, "base")
        for kind in (other, "library"):
            assert held_out(name, kind, "adapter") < 1.03 * held_out(name, kind, "base")


def test_nothing_names_the_machine_it_was_made_on() -> None:
    places = ("/root/", "/home/", "/Users/", "/tmp/", "/opt/")
    for path in filter(lambda path: path.is_file(), SMALL_ADAPTERS.rglob("*")):
        content = path.read_bytes()
        assert not any(place.encode() in content for place in places), path.name


def test_perplexities_are_the_recorded_ones(tmp_path: Any) -> None:
    loraformat.convert(SMALL_MODEL, tmp_path / "bundle")
    loraformat.convert(tmp_path / "bundle", tmp_path / "dense", to="safetensors", dtype="f32")
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, path in ADAPTERS.items():
        adapted = PeftModel.from_pretrained(model, path)
        found = perplexity_of(adapted, tokenizer, heldout(name)).perplexity
        assert found == pytest.approx(held_out(name, name, "adapter"), rel=0.01)
        model = adapted.unload()
