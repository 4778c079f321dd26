"""The script that makes the small adapters: what it reads, and that it repeats itself."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from loraformat.demo.texts import heldout


@pytest.fixture(scope="module")
def script() -> Any:
    tools = str(Path(__file__).parents[2] / "tools")
    sys.path.insert(0, tools)  # the script imports the one that makes the model
    try:
        return import_module("make_small_adapter")
    finally:
        sys.path.remove(tools)


def test_no_paragraph_of_the_manual_is_held_out_and_trained_on(script: Any) -> None:
    parts = [part for d in script.manual_documents() for part in d.text.strip("\n").split("\n\n")]
    assert len(parts) > 1000
    for name in script.HELDOUT_TOPICS:
        assert not set(script.topics[name].split("\n\n")).intersection(parts)


def test_the_held_out_manual_is_prose_the_script_names(script: Any) -> None:
    assert all(f'"{name}" statement' in heldout("manual") for name in script.HELDOUT_TOPICS)


def test_the_same_seed_trains_the_same_adapter(script: Any) -> None:
    recipe = script.Recipe(steps=2, batch=2, window=16, learning_rate=1e-3, warmup_steps=1)
    chosen = script.AdapterRecipe("manual", 4, 4, recipe)
    states = []
    for _ in range(2):
        model = script.with_adapter(script.nf4_values(), chosen)
        script.train(model, torch.arange(1000) % 2048, recipe)
        states.append({k: v for k, v in model.state_dict().items() if "lora_" in k})
    assert states[0] and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(v.any() for k, v in states[0].items() if "lora_B" in k)
