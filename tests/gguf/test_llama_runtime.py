"""The harness itself: what it says of a llama is what torch says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llama_runtime import RuntimeFailure, embeddings, log_probabilities, tokenize
from peer_files import tiny_llama, write_peer_base, write_peer_lora

PROMPTS = [[1, 260, 300, 7], [1, 280, 281, 282, 290, 310]]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    return write_peer_base(tmp_path_factory.mktemp("base") / "base.gguf", model)


def reference(model) -> np.ndarray:
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1].double() for ids in PROMPTS]
    return torch.stack(logits).log_softmax(-1).numpy()


def test_the_base_agrees_with_torch(model, base):
    got = log_probabilities(base, PROMPTS)
    assert got.shape == (2, 320)
    assert abs(got - reference(model)).max() < 1e-5


def test_adapters_and_scales(model, base, tmp_path):
    rng = np.random.default_rng(0)
    adapters, deltas = [], []
    for number, (layer, alpha, scale) in enumerate([(0, 8.0, 1.0), (1, 2.0, 0.5)]):
        a, b = rng.standard_normal((4, 64)) * 0.3, rng.standard_normal((96, 4)) * 0.3
        path = tmp_path / f"{number}.gguf"
        pairs = {f"blk.{layer}.ffn_up.weight": (a, b)}
        adapters.append((write_peer_lora(path, pairs, alpha), scale))
        deltas.append((layer, alpha / 4 * torch.from_numpy(b @ a).float()))
    plain = log_probabilities(base, PROMPTS)
    for scales in (None, (0.25, 1.5), (0.0, 0.0)):
        used = scales or [scale for _, scale in adapters]
        changed = tiny_llama()
        with torch.no_grad():
            for (layer, delta), scale in zip(deltas, used, strict=True):
                changed.model.layers[layer].mlp.up_proj.weight += scale * delta
        got = log_probabilities(base, PROMPTS, adapters, scales=scales)
        assert abs(got - reference(changed)).max() < 1e-5
        assert (abs(got - plain).max() > 0.1) == any(used)


def test_hidden_states(model, base):
    got = embeddings(base, PROMPTS)
    with torch.no_grad():
        for rows, ids in zip(got, PROMPTS, strict=True):
            expected = model.model(torch.tensor([ids])).last_hidden_state[0].numpy()
            assert rows.shape == expected.shape and abs(rows - expected).max() < 1e-4


def test_tokens(base):
    """Pieces that no merge leads to are letters and bytes; llama puts a space before a text."""
    space = [0xE2 + 3, 0x96 + 3, 0x81 + 3]
    assert tokenize(base, ["wa0", "é"]) == [[*space, 281, 259, 51], [*space, 0xC3 + 3, 0xA9 + 3]]
    assert tokenize(base, ["a"], add_special=True) == [[1, *space, 259]]


def test_failures_bring_the_log(base, tmp_path):
    lora = write_peer_lora(
        tmp_path / "l.gguf", {"blk.7.ffn_up.weight": (np.ones((4, 64)), np.ones((96, 4)))}, 8
    )
    with pytest.raises(RuntimeFailure, match="does not exist in base model"):
        log_probabilities(base, PROMPTS, [(lora, 1.0)])
    (tmp_path / "x.gguf").write_bytes(base.read_bytes()[:-500])
    with pytest.raises(RuntimeFailure, match=r"not within the file bounds|corrupted or incomplete"):
        log_probabilities(tmp_path / "x.gguf", PROMPTS)
